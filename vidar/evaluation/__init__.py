"""What a generated video is worth: image and motion metrics, drift over a rollout, contact sheets."""
