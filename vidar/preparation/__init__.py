"""What is computed once, before training, and kept on disk: the text states of prompts."""
