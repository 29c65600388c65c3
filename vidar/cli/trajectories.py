"""`vidar data trajectories`: a teacher's trajectories at a student's levels, or those of others in LMDB."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidar.cli import published

# Options of published models that say how to sample, which is said otherwise here, and rare ones.
_UNUSED = dict.fromkeys(("solver", "steps", "shift", "guidance", "window", "sink", "part", "decoder"))
_UNUSED |= dict.fromkeys(("lora", "lora_scale", "precision", "codec_precision"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--output", type=Path, required=True, help="directory that receives them")
    parser.add_argument("--times", required=True, help="the student's times before the warp, as 1000,750,500,250")
    parser.add_argument("--shift", type=float, required=True, help="time shift of student and teacher")
    parser.add_argument("--rows", type=int, default=16, help="clips made at once, and stored in a file")
    parser.add_argument("--precision", choices=("float16", "float32"), default="float16", help="type of what is stored")
    parser.add_argument("--shard", default="0/1", help="i/N: this process makes every N-th file, from the i-th on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"the teacher: {published.MODEL}")
    what.add_argument("--lmdb", type=Path, help="instead: ODE pairs of others, one LMDB or a directory of several")
    how = parser.add_argument_group("how the teacher generates")
    how.add_argument("--solver-steps", type=int, default=48, help="deterministic Euler steps, which pass all --times")
    how.add_argument("--guidance", type=float, help="scale of guidance (default: the model's own)")
    how.add_argument("--negative", default="", help="what no video shows, for models with a text encoder")
    how.add_argument("--seed", type=int, default=0, help="of the noise and of the order of clips")
    how.add_argument("--given", type=int, default=0, help="latent frames of each clip that are given")
    clips = parser.add_argument_group("what it generates from")
    clips.add_argument("--count", type=int, help="clips (default: each once)")
    clips.add_argument("--tfds", help="conditions and first frames of a prepared TFDS set, as vidar_world/one_shape")
    clips.add_argument("--directory", help="TFDS data directory")
    clips.add_argument("--records", help="or of recorded episodes")
    clips.add_argument("--split", default="train")
    clips.add_argument("--prompts", type=Path, help="or a file with a prompt on each line")
    clips.add_argument("--embeddings", help="text states of the captions (`vidar data embeddings`)")
    model = parser.add_argument_group("how a published teacher is loaded")
    model.add_argument("--recipe", help="wan, or one of causal models")
    model.add_argument("--weights", help="transformer in place of the folder's; path or hub id")
    model.add_argument("--chunk", type=int, help="latent frames a chunk, for causal models")
    model.add_argument("--size", help="HEIGHTxWIDTH in pixels (default: 480x832)")
    model.add_argument("--text-encoder-on-cpu", action="store_true", help="keep the text encoder in host memory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Makes trajectories."""
    from vidar.errors import check_range

    for name in ("count", "rows", "solver_steps"):
        check_range(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    for name in ("seed", "given"):
        check_range(f"--{name}", getattr(options, name), least=0)
    return _import(options) if options.model is None else _generate(options)


def _import(options: argparse.Namespace) -> int:
    from vidar.data.trajectories import TrajectoryFormat
    from vidar.errors import DataError
    from vidar.preparation.lmdb_pairs import LmdbPairs
    from vidar.sampling.solvers import FewStep, level_table

    times, pairs = _times(options), LmdbPairs(options.lmdb)
    levels = level_table(FewStep(times, options.shift))
    if pairs.states != len(levels):
        raise DataError(
            f"{options.lmdb}: keeps {pairs.states} states of each clip, which needs {pairs.states - 1} --times (before "
            f"the clean one), not {len(times)}"
        )
    form = TrajectoryFormat(
        levels=tuple(levels.tolist()),
        latent=pairs.latent,
        clips=min(len(pairs), options.count or len(pairs)),
        rows=options.rows,
        precision=options.precision,
        source={"pairs": pairs.identity, "times": times, "shift": options.shift},
    )
    return _write(options, form, pairs.shard)


def _generate(options: argparse.Namespace) -> int:
    from vidar.devices import enable_compilation_cache
    from vidar.preparation.trajectories import Teacher, clip_order, kept_steps, teacher_sampler
    from vidar.sampling.guidance import classifier_free

    kept = kept_steps(_times(options), options.shift, options.solver_steps)
    enable_compilation_cache()
    pipeline = published.load(options, **_UNUSED)
    guidance = None if options.guidance is None else classifier_free(options.guidance)
    sampler = teacher_sampler(pipeline.system.sampler, options.solver_steps, options.shift, guidance)
    _check_given(options, pipeline, sampler)
    source = _clips(options, pipeline)
    _check_conditions(pipeline, source.clip(0, 0.0))
    clips = options.count or len(source)
    teacher = Teacher(pipeline.model, sampler, kept, min(options.rows, clips), options.seed)
    maker = _Maker(options, pipeline, teacher, source, clip_order(len(source), clips, options.seed))
    return _write(options, maker.form, maker)


class _Maker:
    """From the numbers of clips to their trajectories, with what they were made from."""

    def __init__(self, options: argparse.Namespace, pipeline: Any, teacher: Any, source: Any, order: Any):
        import jax

        from vidar.preparation.embeddings import Embeddings

        self._options, self._pipeline, self._teacher = options, pipeline, teacher
        self._source, self._order = source, order
        self._embeddings = None if options.embeddings is None else Embeddings(options.embeddings)
        self._encode = jax.jit(lambda codec, pixels: codec.encode(pixels))

    @property
    def form(self) -> Any:
        """What will be stored."""
        from vidar.config import to_dict
        from vidar.data.trajectories import TrajectoryFormat
        from vidar.preparation.trajectories import fingerprint
        from vidar.sampling.solvers import level_table

        options, teacher, source = self._options, self._teacher, self._source
        sampler = teacher.sampler
        return TrajectoryFormat(
            levels=tuple(level_table(sampler.solver)[list(teacher.kept)].tolist()),
            latent=(sampler.frames, *sampler.latent),
            clips=len(self._order),
            rows=options.rows,
            given=options.given,
            actions=source.actions,
            precision=options.precision,
            source={
                "teacher": fingerprint(teacher.network),
                "sampler": to_dict(sampler),
                "kept": teacher.kept,
                "seed": options.seed,
                "negative": options.negative,
                "clips": _named(source, options),
                "of": len(source),
            },
        )

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        clips = [self._source.clip(int(self._order[number]), 0.0) for number in numbers]
        stored = {name: [clip[name] for clip in clips] for name in ("actions", "label") if name in clips[0]}
        if "caption" in clips[0]:
            stored["caption"] = [clip["caption"].decode() for clip in clips]
        latents = self._teacher(numbers, self._conditions(clips), self._given(clips))
        return {"latents": latents, "clip": self._order[list(numbers)], **stored}

    def _conditions(self, clips: list[dict[str, Any]]) -> Any:
        """What the teacher is told."""
        import numpy as np

        from vidar.models.frames import Conditions

        model, known = self._pipeline.model.config, {}
        if model.actions:
            known["actions"] = np.stack([clip["actions"] for clip in clips])
        if model.classes:
            known["label"] = np.asarray([clip["label"] for clip in clips], np.int32)
        if model.text:
            known |= self._text([clip["caption"].decode() for clip in clips])
        return Conditions(**known)

    def _text(self, captions: list[str]) -> dict[str, Any]:
        import numpy as np

        if self._embeddings is not None:
            return {"text": np.stack([self._embeddings.read(caption) for caption in captions])}
        if not any("text" in branch.drops for branch in self._teacher.sampler.guidance):
            return {"text": self._pipeline.states(captions)}
        states = self._pipeline.states([*captions, self._options.negative])
        return {"text": states[:-1], "negative": np.repeat(states[-1:], len(captions), axis=0)}

    def _given(self, clips: list[dict[str, Any]]) -> Any:
        """Latents of the frames that are given."""
        import jax.numpy as jnp
        import numpy as np

        if not self._options.given:
            return None
        codec = self._pipeline.codec
        count = codec.config.pixel_frames(self._options.given)
        return self._encode(codec, jnp.asarray(np.stack([clip["pixels"][:count] for clip in clips])))


def _write(options: argparse.Namespace, form: Any, make: Any) -> int:
    from tqdm import tqdm

    from vidar.data.trajectories import TrajectoryWriter
    from vidar.preparation.trajectories import prepare

    part, parts = _shard(options.shard)
    writer = TrajectoryWriter(options.output, form)
    prepare(writer, make, part, parts, lambda work: tqdm(work, unit="file"))
    left = len(writer.missing())
    levels = ", ".join(f"{1000 * level:.6g}" for level in form.levels)
    state = f"{left} of {form.shards} files are still missing" if left else "complete"
    print(f"{options.output}: {form.clips} trajectories at times {levels}; {state}")
    if not left:
        print(f"train on them with data.trajectories='{options.output}' and objective.kind='ode_regression'")
    return 0


def _clips(options: argparse.Namespace, pipeline: Any) -> Any:
    """What the teacher's videos are made from: clips of a data set, or prompts."""
    from vidar.data.pipeline import DataConfig, open_source
    from vidar.data.sources import PromptClips
    from vidar.errors import ConfigError

    named = [name for name in ("tfds", "records", "prompts") if getattr(options, name) is not None]
    if len(named) != 1:
        raise ConfigError("what is generated from? give one of --tfds, --records and --prompts")
    if options.prompts is not None:
        if options.given:
            raise ConfigError(f"--given={options.given} takes frames of a data set, which --prompts has none of")
        return PromptClips(options.prompts)
    video = pipeline.system.config.video
    source = open_source(
        DataConfig(
            tfds=options.tfds,
            directory=options.directory,
            records=options.records,
            split=options.split,
            frames=pipeline.codec.config.pixel_frames(video.frames),
        )
    )
    if options.given and tuple(source.size) != (video.height, video.width):
        raise ConfigError(
            f"--given: the clips have {source.size[0]}×{source.size[1]} pixels, the model {video.height}×{video.width}"
        )
    return source


def _named(source: Any, options: argparse.Namespace) -> str:
    """What tells sets of clips apart: the first and the last one stand for all."""
    from vidar.preparation.trajectories import fingerprint

    if options.prompts:
        return f"prompts {source.digest}"
    ends = {str(number): source.clip(number, 0.0) for number in (0, len(source) - 1)}
    return f"{options.tfds or options.records} {options.split} {fingerprint(ends)}"


def _check_conditions(pipeline: Any, clip: dict[str, Any]) -> None:
    from vidar.errors import DataError

    model = pipeline.model.config
    used = {"actions": model.actions, "label": model.classes, "caption": model.text}
    lacking = [name for name, wanted in used.items() if wanted and name not in clip]
    if lacking:
        raise DataError(f"the teacher needs {' and '.join(lacking)}; the clips have only {', '.join(clip)}")


def _check_given(options: argparse.Namespace, pipeline: Any, sampler: Any) -> None:
    from vidar.errors import ConfigError

    levels, frames, chunk = pipeline.system.config.levels, sampler.frames, sampler.chunk
    if pipeline.model.config.image is not None:
        raise ConfigError(f"{options.model}: takes an image beside all frames; trajectories need a model without")
    if not options.given:
        return
    head = int(sampler.first)
    if options.given < head or (options.given - head) % chunk or options.given >= frames:
        raise ConfigError(
            f"--given={options.given} of {frames} latent frames must be whole chunks of {chunk}, and leave some"
        )
    if not sampler.program.lag and levels.one_for_all:
        raise ConfigError(
            f"--given={options.given}: {options.model} has never seen clean frames beside noisy ones; train it with "
            "levels.context clean_prefix, or leave --given out"
        )


def _times(options: argparse.Namespace) -> tuple[float, ...]:
    """The student's times; a final 0, the clean state, is understood."""
    from vidar.errors import ConfigError

    try:
        times = tuple(float(word) for word in options.times.split(","))
    except ValueError as error:
        raise ConfigError(f"--times={options.times}: write numbers with commas, such as 1000,750,500,250") from error
    return times[:-1] if len(times) > 1 and times[-1] == 0 else times


def _shard(text: str) -> tuple[int, int]:
    from vidar.errors import ConfigError

    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ConfigError(f"--shard={text}: write i/N with i from 0 to N - 1, such as 0/4")
    return int(part), int(parts)
