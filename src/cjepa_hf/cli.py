"""The command line `cjepa-hf`: one thin function per command; libraries are imported by the command that needs them."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors in what the user gave are one line on stderr, without a traceback (exit status 2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if argv[:1] == ["evaluate"] and any(word.partition("=")[0] == "--suite" for word in argv):
        arguments, rest = argparse.Namespace(command="evaluate", run=suite), argv[1:]
    else:
        arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run not in (train, suite):
        parser.error(f"unknown arguments: {' '.join(rest)} (see `cjepa-hf {arguments.command} --help`)")
    try:
        arguments.run(arguments, rest)
    except KeyboardInterrupt:
        print(f"cjepa-hf {arguments.command}: interrupted; the same command starts or continues it", file=sys.stderr)
        return 130
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:  # a fault of this program: its traceback is wanted
            raise
        print(f"cjepa-hf {arguments.command}: {explanation}", file=sys.stderr)
        return 2
    return 0


def _explanation(error: Exception) -> str | None:
    """One line for an error in what the user gave (values, files, folders), None for any other."""
    from concurrent.futures.process import BrokenProcessPool

    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    text = " ".join(str(error).split())
    if isinstance(error, SafetensorError):
        return f"a .safetensors file is damaged ({text}): copy or download it again"
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in text:
        return "the weights are not of the sizes that config.json says (listed above): copy or download both again"
    if isinstance(error, StrictDataclassError):
        return f"config.json: {text}. Correct it, or copy or download the model again"
    if text.startswith("Repo id must be"):  # what a missing folder is taken for
        return f"no such folder, and not a Hub id (owner/name) either: {text}"
    if isinstance(error, DatasetsError) and error.__cause__ is not None:
        text = f"{text} ({' '.join(str(error.__cause__).split())})"
    known = ValueError, OSError, DatasetsError
    if isinstance(error, ImportError) and "cjepa-hf[" in text:  # an extra that is not installed
        return text
    return text if isinstance(error, known) or isinstance(error.__cause__, BrokenProcessPool) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cjepa-hf", description="Object-centric world models: train, imagine, plan.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name, run, text, **kwargs):
        sub = commands.add_parser(name, help=text, description=text, **kwargs)
        sub.set_defaults(run=run)
        return sub

    sub = command("demo", demo, "Plan held-out Push-T tasks from pixels with the checkpoint that ships.")
    sub.add_argument("--model", help="folder or Hub id of a CJepaModel with a slot encoder (default: the shipped one)")
    sub.add_argument("--output-dir", default="cjepa-demo", help="where the GIF and the PNG go (default: %(default)s)")
    sub.add_argument("--num-tasks", type=int, default=10, help="tasks of the protocol (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the planner (default: %(default)s)")
    _common(sub)

    sub = command("collect", collect, "Collect simulated episodes into a dataset folder (resumable).")
    sub.add_argument("environment", choices=["push_t", "collisions"])
    sub.add_argument("--output-dir", required=True)
    sub.add_argument("--episodes", type=int, default=10_000, help="of the training split (default: %(default)s)")
    sub.add_argument("--validation-episodes", type=int, default=500, help="(default: %(default)s)")
    sub.add_argument("--test-episodes", type=int, default=0, help="(default: %(default)s)")
    sub.add_argument("--episode-length", type=int, help="Push-T: actions per episode (default: 80)")
    sub.add_argument("--policy", choices=["gentle", "weak", "mixture"], help="Push-T (default: gentle)")
    sub.add_argument("--videos", action="store_true", help="collisions: also write mp4 files")
    sub.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    sub.add_argument("--workers", type=int, help="processes (default: one per core)")
    sub.add_argument("--frames", type=int, metavar="PX", help="also store frames of this many pixels")
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")

    sub = command("extract", extract, "Turn videos or episodes into a slot dataset with a slot encoder (resumable).")
    sub.add_argument("source", help="video files, folders of them, tar shards, HDF5, collected episodes, or a Hub id")
    sub.add_argument(
        "--encoder", required=True,
        help="folder or Hub id of a slot encoder, or of a CJepaModel with one; state: the true states of collision scenes",
    )  # fmt: skip
    sub.add_argument("--output-dir", required=True)
    sub.add_argument("--batch-size", type=int, default=64, help="frames per pass (default: %(default)s)")
    sub.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="(default: %(default)s)")
    sub.add_argument("--frame-skip", type=int, help="suggested for windows (default: 5; of collision states 4)")
    sub.add_argument("--num-frames", type=int, help="stop after this many frames per split, in whole episodes")
    sub.add_argument("--splits", nargs="+", help="only these (default: all)")
    sub.add_argument("--velocities", action="store_true", help="--encoder state: velocities in the slots too")
    sub.add_argument("--num-videos", type=int, default=8, help="per pass, encoders with memory (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of random initial slots (default: %(default)s)")
    sub.add_argument(
        "--render-resolution", type=int, metavar="PX",
        help="per side of frames drawn from states (default: what the encoder takes)",
    )  # fmt: skip
    sub.add_argument(
        "--frames-per-file", type=int, default=4096, help="what an interruption can lose (default: %(default)s)"
    )
    sub.add_argument("--strict", action="store_true", help="end with an error if a damaged video was left out")
    sub.add_argument(
        "--preview", type=int, metavar="N", help="first draw the masks of N videos, in OUTPUT_DIR/preview"
    )
    sub.add_argument("--push-to-hub", "--push_to_hub", metavar="OWNER/NAME", help="upload the finished dataset")
    _common(sub)

    sub = command("probe", probe, "Fit what reads position, shape, color and material from slots of collision scenes.")
    sub.add_argument("dataset", help="slots that `cjepa-hf extract SCENES` made (their states are read)")
    sub.add_argument("--encoder", required=True, help="as for `cjepa-hf extract`")
    sub.add_argument(
        "--output-dir", required=True, help="folder for slot_probe.safetensors, such as the world model's"
    )
    sub.add_argument("--num-videos", type=int, default=300, help="of the split train (default: %(default)s)")
    _common(sub)

    sub = command(
        "imagine", imagine_questions,
        "Imagine the videos that predictive and counterfactual questions ask about, to train and evaluate an ALOE on.",
    )  # fmt: skip
    sub.add_argument("dataset", help="slot dataset with one episode per video")
    sub.add_argument("--questions", required=True, help="folder with the question files of its splits")
    sub.add_argument(
        "--model", required=True,
        help="folder or Hub id of a CJepaModel without actions (collisions: the shipped one), or simulator: what really "
        "happens in collected scenes",
    )  # fmt: skip
    sub.add_argument("--encoder", help="--model simulator: that of the slot dataset (not needed for true states)")
    sub.add_argument("--probe", help="folder or Hub id with slot_probe.safetensors (default: that of the model)")
    sub.add_argument("--output-dir", required=True)
    sub.add_argument("--splits", nargs="+", help="only these (default: all)")
    sub.add_argument(
        "--num-videos", type=int, metavar="N", help="only the first N videos of the split train (default: all)"
    )
    sub.add_argument("--num-frames", type=int, default=32, help="imagined after a video (default: %(default)s)")
    sub.add_argument(
        "--contact-distance", type=float,
        help="between centers, where a removed object's first contact is; what if begins there (default: 0.75)",
    )  # fmt: skip
    _common(sub)

    sub = command(
        "train", train, "Train a model; what follows its name is that training's own arguments.", add_help=False
    )
    sub.add_argument(
        "model", nargs="?", choices=["cjepa", "aloe", "dino-wm", "color-isa", "crop-slots", "savi", "videosaur"]
    )
    sub.add_argument("-h", "--help", action="store_true", dest="show_help")

    sub = command(
        "evaluate", evaluate, "A world model and its controls on a frozen protocol: planning on Push-T, or cf-rollout."
    )
    sub.add_argument("--model", nargs="+", help="folder or Hub id (default: the shipped one); cf-rollout: any number")
    sub.add_argument("--suite", metavar="NAME", help="train and compare world models instead (push-t, masking, auxiliary, "
                     "flags); the other arguments are then those of `cjepa-hf evaluate --suite push-t --help`")  # fmt: skip
    sub.add_argument("--protocol", default="pusht-25", help="pusht-25 or cf-rollout; with -validation after it other tasks, to choose settings on "
                     "(default: %(default)s)")  # fmt: skip
    sub.add_argument("--num-tasks", type=int, help="only the first tasks (default: all)")
    sub.add_argument("--dataset", help="cf-rollout: state slots with the splits train and validation, for the readout")
    sub.add_argument("--start", nargs="+", default=["B", "A"], choices=["A", "B"],
                     help="cf-rollout: imagine from the beginning (A), from the removed object's first contact (B)")  # fmt: skip
    sub.add_argument("--operator", nargs="+", default=["empty"], choices=["empty", "drop", "mask"],
                     help="cf-rollout: how the object is taken away (default: empty)")  # fmt: skip
    sub.add_argument(
        "--slot-encoder", help="cf-rollout: folder or Hub id (default: the one in the model, else states)"
    )
    sub.add_argument("--text-only", help="cf-rollout: an ALOE trained with --text_only true")
    sub.add_argument("--occluded", action="store_true", help="cf-rollout: also hide the history of an object")
    sub.add_argument(
        "--planner", nargs="+", default=["default"], metavar="PLANNER",
        help="default (short CEM, then gradient steps; replanned after every block), sampling (CEM alone, no second search), paper (the "
        "paper's CEM), cem:SAMPLESxITERATIONS:ELITES; /receding, /shrinking, /window=W, /held=STEPS after it override single settings",
    )  # fmt: skip
    sub.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the planner (default: 0)")
    sub.add_argument("--no-proprio", action="store_true", help="plan from images alone")
    sub.add_argument("--style", default="smooth", choices=["smooth", "aliased", "peer"], help="of the frames")
    sub.add_argument("--simulator", type=int, metavar="N", help="also plan N tasks with the true simulator as model")
    sub.add_argument("--controls", action="store_true", help="also random, no-op and replayed actions")
    sub.add_argument("--output", help="write the results as JSON to this file")
    _common(sub)

    sub = command(
        "analyze", analyze, "Which objects a prediction uses, against who touched whom and what interventions change."
    )
    sub.add_argument("--model", nargs="+", help="folders or Hub ids of CJepaModels (default: the shipped one)")
    sub.add_argument("--dataset", required=True, help="slots of simulated episodes, with state and contacts")
    sub.add_argument("--split", default="validation", help="(default: %(default)s)")
    sub.add_argument("--num-windows", type=int, default=2000, help="drawn at random (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the windows (default: %(default)s)")
    sub.add_argument("--plot", metavar="PNG", help="draw the influences of the first model in a window with a contact")
    sub.add_argument("--measure", default="leave_one_out", help="the one that --plot draws (default: %(default)s)")
    sub.add_argument("--output", help="write the results as JSON to this file")
    _common(sub)

    sub = command("plan", plan, "Actions that lead from one image to another (pipeline goal-planning).")
    sub.add_argument("start", help="image file")
    sub.add_argument("goal", help="image file")
    sub.add_argument("--model", help="folder or Hub id (default: the shipped one)")
    sub.add_argument("--proprio", type=float, nargs="+", help="current proprioception in environment units")
    sub.add_argument("--horizon", type=int, default=5, help="action blocks (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    _common(sub)

    sub = command(
        "rollout", rollout, "Imagine a video's continuation, as it is and with interventions on its objects."
    )
    sub.add_argument("video", help="video file, folder of pictures, .npy of frames or of slots [T, N, D]")
    sub.add_argument("--model", help="folder or Hub id of a CJepaModel (default: the shipped one)")
    sub.add_argument(
        "--intervention", "-i", action="append", default=[], metavar="KIND:SLOT",
        help="drop:SLOT (one object less), empty:SLOT (nothing there), mask:SLOT (not observed), delay:SLOT:FRAMES; SLOT is "
        'a number or, with a probe, words ("red cube"). Repeat it to compare several',
    )  # fmt: skip
    sub.add_argument("--num-frames", type=int, help="to imagine (default: 32, or what the actions say)")
    sub.add_argument("--start", type=int, help="first imagined frame (default: after the video)")
    sub.add_argument("--actions", help=".npy, environment units, for a model that takes them")
    sub.add_argument("--proprio", help=".npy [T, P], environment units, for a model that takes it")
    _slot_arguments(sub)
    sub.add_argument("--gif", help="write all rollouts side by side to this file")
    sub.add_argument("--output", help="write slots, effects and paths to this .npz")
    _common(sub)

    sub = command("answer", answer, "Answer a question about a video (pipeline video-question-answering).")
    sub.add_argument("video", help="video file, folder of pictures, .npy of frames or of slots [T, N, D]")
    sub.add_argument("question", help='in CLEVRER\'s words, such as "What will happen if the red cube is removed?"')
    sub.add_argument("options", nargs="*", help="of a multiple-choice question")
    sub.add_argument(
        "--model",
        help="folder or Hub id of an AloeForVideoQuestionAnswering (default: the shipped one, collisions_aloe)",
    )
    sub.add_argument(
        "--world-model",
        help="folder or Hub id of a CJepaModel, for predictive and counterfactual questions (default of the shipped model: "
        "the shipped one, collisions)",
    )
    _slot_arguments(sub)
    sub.add_argument("--question-type", choices=["descriptive", "explanatory", "predictive", "counterfactual"])
    sub.add_argument("--frames-from", default="imagined", choices=["imagined", "released", "observed"],
                     help="what the answer is based on; released: as the paper's code (default: %(default)s)")  # fmt: skip
    sub.add_argument("--contact-distance", type=float, help="imagine from the removed object's first contact on")
    sub.add_argument("--removed-slot", type=int, help="the slot that a counterfactual question takes away")
    _common(sub)

    sub = command(
        "convert", convert, "Turn a file of the paper's authors (checkpoint or slots) into a model or slot dataset."
    )
    sub.add_argument("file", help="the original file; it is read as data, nothing in it is run")
    sub.add_argument("--output-dir", required=True)
    sub.add_argument("--config", help="config.json, a folder with one, or an entry of hub_configs")
    sub.add_argument("--actions", help="pickle of the same videos' actions (slots)")
    sub.add_argument("--proprio", help="pickle of their proprioception (slots)")
    sub.add_argument("--states", help="pickle of their states (slots)")
    sub.add_argument("--frame-skip", type=int, help="suggested for windows (slots; default: 5 with actions, else 2)")
    sub.add_argument("--json", action="store_true", help="print what was written as JSON")

    sub = command("card", write_card, "Write the card (README.md) of a model or slot dataset from its files.")
    sub.add_argument("folder", nargs="?", help="model, slot dataset, or entry of hub_configs")
    sub.add_argument("--repo-id", help="name on the Hub (default: the folder's name)")
    sub.add_argument("--results", nargs="+", metavar="FILE", help="measured results (default: those of source.json)")
    sub.add_argument("--output", help="file to write (default: README.md in the folder)")
    sub.add_argument("--force", action="store_true", help="replace a card that is there")
    sub.add_argument("--all", metavar="DIR", help="instead of one: the cards of all entries of hub_configs")
    sub.add_argument("--owner", default="galilai", help="of the repositories of --all (default: %(default)s)")

    sub = command(
        "publish", publish, "Upload a model (safetensors alone) or a slot dataset to the Hub, in one commit."
    )
    sub.add_argument("folder")
    sub.add_argument("repo_id", help="owner/name; made if it does not exist")
    sub.add_argument("--dry-run", action="store_true", help="check the folder and list what would go, send nothing")
    sub.add_argument("--private", action="store_true", default=None, help="if the repository is made: make it private")
    sub.add_argument("--revision", help="branch to commit to (default: main)")
    sub.add_argument("--create-pr", action="store_true", help="as a pull request")
    sub.add_argument("--with-code", action="store_true", help="the predictor alone, with code for trust_remote_code")
    sub.add_argument("--message", help="of the commit")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _slot_arguments(sub):
    sub.add_argument("--slot-encoder", help="folder or Hub id (default: the one in the world model)")
    sub.add_argument("--probe", help="folder or Hub id with slot_probe.safetensors (default: beside the model)")


def _common(sub):
    sub.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    sub.add_argument("--json", action="store_true", help="print data instead of tables")


def _device(arguments) -> str:
    import torch

    if arguments.device:
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--device {arguments.device} cannot be used here ({str(error).splitlines()[0]}): leave --device out"
            ) from error
        return arguments.device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _model(given: str | None, default: str = "push_t") -> str:
    """Folder or Hub id of a model: what was given, or one that ships, by name."""
    from cjepa_hf.checkpoints import bundled_checkpoint, bundled_names

    model = default if given is None else given
    if model in bundled_names() and not (given and Path(model).is_dir()):
        return str(bundled_checkpoint(model))
    if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        shipped = " or ".join(bundled_names())
        raise FileNotFoundError(f"no folder {model}, not a Hub id (owner/name) either, and {shipped} is what ships")
    return model


def _image(path: str):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): give a PNG or JPEG file") from error
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"{path} is an image of mode {image.mode!r}: give one in color (RGB)")
    return image.convert("RGB")


def demo(arguments, _) -> None:
    from cjepa_hf.demo import print_report, run_demo

    report = run_demo(
        _model(arguments.model),
        arguments.output_dir,
        num_tasks=arguments.num_tasks,
        seed=arguments.seed,
        device=_device(arguments),
        progress=not arguments.json,
    )
    print(json.dumps(report, indent=1)) if arguments.json else print_report(report)


def collect(arguments, _) -> None:
    from cjepa_hf.data.collect import collect_collisions, collect_push_t

    counts = {
        "train": arguments.episodes,
        "validation": arguments.validation_episodes,
        "test": arguments.test_episodes,
    }
    common = {
        "seed": arguments.seed,
        "num_workers": arguments.workers,
        "frames_resolution": arguments.frames,
        "progress": not arguments.json,
    }
    if arguments.environment == "collisions":
        if arguments.episode_length is not None or arguments.policy is not None:
            raise ValueError(
                "--episode-length and --policy are Push-T's: a collision scene has 128 frames, nobody acts"
            )
        folder = collect_collisions(arguments.output_dir, num_scenes=counts, videos=arguments.videos, **common)
    else:
        if arguments.videos:
            raise ValueError("--videos belongs to collisions: Push-T stores frames (--frames 64)")
        length = 80 if arguments.episode_length is None else arguments.episode_length
        policy = arguments.policy or "gentle"
        folder = collect_push_t(
            arguments.output_dir, num_episodes=counts, episode_length=length, policy=policy, **common
        )
    print((folder / "collection.json").read_text() if arguments.json else f"Episodes in {folder}")


def extract(arguments, _) -> None:
    from cjepa_hf.data.extract import extract_slots

    if arguments.encoder == "state":
        folder = _extract_states(arguments)
        print((folder / "slot_dataset.json").read_text() if arguments.json else f"Slots in {folder}")
        return
    if arguments.velocities:
        raise ValueError("--velocities belongs to --encoder state: a slot encoder sees what it sees")
    is_first = int(os.environ.get("RANK", 0)) == 0  # of the processes that `accelerate launch` starts
    if arguments.preview and is_first:
        from cjepa_hf.evaluation.preview import write_previews

        pictures = Path(arguments.output_dir) / "preview"
        split = arguments.splits[0] if arguments.splits else None
        shared = {"split": split, "seed": arguments.seed, "device": _device(arguments)}
        shared["render_resolution"] = arguments.render_resolution
        seen = write_previews(arguments.source, arguments.encoder, pictures, num_videos=arguments.preview, **shared)
        if not arguments.json:
            _print_preview(seen, pictures)
    folder = extract_slots(
        arguments.source,
        arguments.encoder,
        arguments.output_dir,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        frame_skip=5 if arguments.frame_skip is None else arguments.frame_skip,
        num_frames=arguments.num_frames,
        splits=arguments.splits,
        num_videos=arguments.num_videos,
        render_resolution=arguments.render_resolution,
        seed=arguments.seed,
        frames_per_file=arguments.frames_per_file,
        strict=arguments.strict,
        device=_device(arguments),
        progress=not arguments.json,
    )
    if not is_first:
        return
    address = None
    if arguments.push_to_hub:
        from cjepa_hf.hub.publish import publish

        address = publish(folder, arguments.push_to_hub)["url"]
    print((folder / "slot_dataset.json").read_text() if arguments.json else f"Slots in {folder}")
    if address and not arguments.json:
        print(f"Uploaded to {address}")


def _extract_states(arguments) -> Path:
    from cjepa_hf.data.state_slots import write_state_slots

    for name in ("preview", "push_to_hub"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} needs a slot encoder, and --encoder state is none")
    return write_state_slots(
        arguments.source,
        arguments.output_dir,
        splits=arguments.splits,
        frame_skip=arguments.frame_skip or 4,
        velocities=arguments.velocities,
        num_frames=arguments.num_frames,
        progress=not arguments.json,
    )


def _print_preview(seen: dict, folder: Path) -> None:
    print(f"Masks in {folder}: {len(seen['videos'])} of the split {seen['split']!r}")
    for one in seen["skipped"]:
        print(f"  {one['episode_id']} is damaged: {one['reason']}")
    for one in seen["videos"]:
        if "note" in one:
            print(f"  {one['name']}: {one['note']}")
    if seen["foreground_ari"] is not None:
        print(
            f"  foreground ARI {seen['foreground_ari']:.3f}, {seen['switches_per_100_frames']:.1f} changes of slot per "
            f"100 frames (means over the videos with true masks)"
        )


def probe(arguments, _) -> None:
    from cjepa_hf.evaluation.object_slots import fit_object_probe

    if arguments.num_videos < 1:
        raise ValueError(f"--num-videos must be at least 1, got {arguments.num_videos}")
    fitted, quality = fit_object_probe(
        arguments.dataset, arguments.encoder, num_videos=arguments.num_videos, device=_device(arguments)
    )
    path = fitted.save_pretrained(arguments.output_dir)
    if arguments.json:
        print(json.dumps({"path": str(path), **quality}))
        return
    print(f"Wrote {path}. On {quality['num_test_videos']} videos of the split validation:")
    for name, value in quality.items():
        print(f"  {name:24} {value:.4g}" if isinstance(value, float) else f"  {name:24} {value}")


def imagine_questions(arguments, _) -> None:
    from cjepa_hf import CJepaModel, SlotProbe
    from cjepa_hf.data.clevrer import read_json
    from cjepa_hf.data.slots import METADATA_FILE
    from cjepa_hf.question_videos import describe_skipped, write_question_videos, write_true_question_videos

    shared = {
        "splits": arguments.splits,
        "num_future_frames": arguments.num_frames,
        "num_videos": None if arguments.num_videos is None else {"train": arguments.num_videos},
        "progress": not arguments.json,
    }
    if arguments.model == "simulator":
        if arguments.probe or arguments.contact_distance is not None:
            raise ValueError(
                "--probe and --contact-distance say how a model imagines, and the simulator needs neither"
            )
        folder = write_true_question_videos(
            arguments.dataset,
            arguments.questions,
            arguments.output_dir,
            encoder=arguments.encoder if arguments.encoder in (None, "state") else _model(arguments.encoder),
            device=_device(arguments),
            **shared,
        )
    else:
        if arguments.encoder:
            raise ValueError("--encoder belongs to --model simulator: a world model imagines slots")
        name = _model(arguments.model)
        model = CJepaModel.from_pretrained(name, use_safetensors=True).eval().to(_device(arguments))
        folder = write_question_videos(
            arguments.dataset,
            arguments.questions,
            model,
            arguments.output_dir,
            probe=SlotProbe.from_pretrained(arguments.probe or name),
            contact_distance=0.75 if arguments.contact_distance is None else arguments.contact_distance,
            world_model_name=Path(name).resolve().name if Path(name).exists() else name,
            **shared,
        )
    metadata = read_json(folder / METADATA_FILE)
    if arguments.json:
        print(json.dumps(metadata))
        return
    print(f"Slots in {folder}")
    if metadata["skipped"]:
        print(describe_skipped(metadata["skipped"]))


def train(arguments, rest) -> None:
    if arguments.model is None:
        print(
            "usage: cjepa-hf train {cjepa,aloe,dino-wm,color-isa,crop-slots,savi,videosaur} [arguments]; `cjepa-hf train "
            "cjepa --help` lists them"
        )
        return
    if arguments.show_help:
        rest = ["--help", *rest]
    sys.argv[0] = f"cjepa-hf train {arguments.model}"  # what the parser of the training calls itself
    importlib.import_module(f"cjepa_hf.training.{arguments.model.replace('-', '_')}").main(rest)


def _output_file(arguments) -> Path | None:
    """--output, checked before the work, so that a wrong path costs none."""
    output = Path(arguments.output) if arguments.output else None
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder: give the name of a file")
    return output


def evaluate(arguments, _) -> None:
    output = _output_file(arguments)
    if arguments.protocol.startswith("cf-rollout"):
        from cjepa_hf.evaluation.counterfactual import evaluate_cf_rollout, print_cf_rollout

        if not arguments.model or not arguments.dataset:
            raise ValueError("cf-rollout needs --model FOLDER [FOLDER ...] and --dataset STATE_SLOTS")
        results = evaluate_cf_rollout(
            arguments.model,
            dataset=arguments.dataset,
            protocol=arguments.protocol,
            num_tasks=arguments.num_tasks,
            starts=arguments.start,
            operators=arguments.operator,
            slot_encoder=arguments.slot_encoder,
            text_only=arguments.text_only,
            occluded=arguments.occluded,
            device=_device(arguments),
            progress=not arguments.json,
            on_row=(lambda results: _write(output, results)) if output else None,
        )
        print(json.dumps(results, indent=1)) if arguments.json else print_cf_rollout(results)
        return
    from cjepa_hf.evaluation.processes import evaluate_push_t_in_processes
    from cjepa_hf.evaluation.suite import print_evaluation

    if arguments.model and len(arguments.model) > 1:
        raise ValueError(f"{arguments.protocol} takes one --model, got {len(arguments.model)}")
    arguments.model = arguments.model[0] if arguments.model else None
    results = evaluate_push_t_in_processes(
        _model(arguments.model),
        protocol=arguments.protocol,
        planners=arguments.planner,
        seeds=arguments.seeds,
        num_tasks=arguments.num_tasks,
        use_proprio=not arguments.no_proprio,
        style=arguments.style,
        simulator_tasks=arguments.simulator,
        controls=arguments.controls,
        device=_device(arguments),
        progress=not arguments.json,
        on_row=(lambda results: _write(output, results)) if output else None,
    )
    if results is not None:  # of several processes, the first one has them
        print(json.dumps(results, indent=1)) if arguments.json else print_evaluation(results)


def suite(_, rest) -> None:
    importlib.import_module("cjepa_hf.evaluation.comparison").main(rest)


def _write(path: Path, results: dict) -> None:
    from cjepa_hf.data.slots import write_text

    write_text(path, json.dumps(results, indent=1) + "\n")


def analyze(arguments, _) -> None:
    from cjepa_hf.analysis import analyze, draw_example, print_analysis

    output = _output_file(arguments)
    models = [_model(model) for model in arguments.model or [None]]
    shared = {"split": arguments.split, "num_windows": arguments.num_windows, "seed": arguments.seed}
    results = analyze(
        models,
        arguments.dataset,
        **shared,
        device=_device(arguments),
        progress=not arguments.json,
        on_model=(lambda results: _write(output, results)) if output else None,
    )
    print(json.dumps(results, indent=1)) if arguments.json else print_analysis(results)
    if arguments.plot:
        draw_example(models[0], arguments.dataset, arguments.plot, measure=arguments.measure, **shared)


def plan(arguments, _) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModel, pipeline

    inputs = {"start": _image(arguments.start), "goal": _image(arguments.goal)}
    folder, device = _model(arguments.model), torch.device(_device(arguments))
    # not `pipeline(model=folder)`: it wraps what is wrong with a damaged folder in a page of traceback
    model, parts = AutoModel.from_pretrained(folder, use_safetensors=True), {}
    if getattr(model, "slot_encoder", None) is not None:
        parts["image_processor"] = AutoImageProcessor.from_pretrained(folder)
    planner = pipeline("goal-planning", model=model, device=device, **parts)
    if arguments.proprio:
        inputs["proprio"] = arguments.proprio
    result = planner(inputs, horizon=arguments.horizon, seed=arguments.seed)
    if arguments.json:
        data = {"actions": result["actions"].tolist(), "cost": float(result["cost"])}
        print(json.dumps(data))
    else:
        print(f"cost {float(result['cost']):.4f}; actions (one per row):")
        for action in result["actions"]:
            print("  " + "  ".join(f"{value:7.3f}" for value in action))


def _video(path: str):
    """The path, or the array of a .npy file."""
    if Path(path).suffix != ".npy":
        return path
    import numpy as np

    return np.load(path, allow_pickle=False)


def _slot_parts(arguments, folder: str | None) -> dict:
    """Slot encoder, image processor and probe, as the pipelines take them; `folder` may hold the first two."""
    from contextlib import suppress

    from transformers import AutoImageProcessor, AutoModel

    parts, folder = {"probe": arguments.probe}, arguments.slot_encoder or folder
    if arguments.slot_encoder:
        parts["slot_encoder"] = AutoModel.from_pretrained(arguments.slot_encoder, use_safetensors=True)
    if folder and (not Path(folder).is_dir() or (Path(folder) / "preprocessor_config.json").is_file()):
        with suppress(OSError):  # none on the Hub: the encoder's default
            parts["image_processor"] = AutoImageProcessor.from_pretrained(folder)
    return parts


def rollout(arguments, _) -> None:
    import numpy as np
    import torch
    from transformers import pipeline

    from cjepa_hf import CJepaModel

    folder, inputs = _model(arguments.model), {"video": _video(arguments.video)}
    for name in ("actions", "proprio"):
        if getattr(arguments, name):
            inputs[name] = np.load(getattr(arguments, name), allow_pickle=False)
    model = CJepaModel.from_pretrained(folder, use_safetensors=True)
    device, parts = torch.device(_device(arguments)), _slot_parts(arguments, folder)
    imagine = pipeline("counterfactual-rollout", model=model, device=device, **parts)
    result = imagine(
        inputs, interventions=arguments.intervention, num_frames=arguments.num_frames, start=arguments.start,
        gif=arguments.gif,
    )  # fmt: skip
    if arguments.output:
        output = Path(arguments.output)
        paths = {f"paths_{name}": value for name, value in (result["paths"] or {}).items()}
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **{name: result[name] for name in ("factual", "slots", "effect", "observed")}, **paths)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    report = {name: result[name] for name in ("start", "history", "short_history", "interventions", "objects", "gif")}
    report["num_frames"], report["output"] = len(result["factual"]), arguments.output
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{report['num_frames']} frames imagined from frame {report['start']} on, after {report['history']} steps")
    if report["short_history"]:
        print(f"  (the model was trained with {model.config.history_length} steps before)")
    for one in report["interventions"]:
        print(f"{one['intervention']}: {len(one['affected'])} other objects affected")
        for row in one["affected"]:
            name = f" ({row['object']})" if row.get("object") else ""
            print(f"  slot {row['slot']}{name} from frame {row['from_frame']}, by up to {row['largest_effect']:.3f}")
    for name in filter(None, (arguments.gif, arguments.output)):
        print(f"Written: {name}")


def answer(arguments, _) -> None:
    import torch
    from transformers import pipeline

    from cjepa_hf import AloeForVideoQuestionAnswering, AloeProcessor

    shipped = _model(None, "collisions_aloe")
    folder, world_model = _model(arguments.model, "collisions_aloe"), arguments.world_model
    if world_model or folder == shipped:  # what ships answers with the world model that ships
        world_model = _model(world_model, "collisions")
    model = AloeForVideoQuestionAnswering.from_pretrained(folder, use_safetensors=True)
    ask = pipeline(
        "video-question-answering", model=model, processor=AloeProcessor.from_pretrained(folder),
        world_model=world_model, device=torch.device(_device(arguments)), **_slot_parts(arguments, world_model),
    )  # fmt: skip
    result = ask(
        {
            "video": _video(arguments.video), "question": arguments.question, "options": arguments.options or None,
            "question_type": arguments.question_type, "removed_slot": arguments.removed_slot,
        },
        frames_from=arguments.frames_from, contact_distance=arguments.contact_distance,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return
    if result["options"] is None:
        print(f"{result['answer']}  ({result['scores'][result['answer']]:.2f})")
    for one in result["options"] or []:
        print(f"{one['answer']:<8} {one['score']:.2f}  {one['option']}")
    frames = result["imagined_frames"]
    print(f"{result['question_type']}; {len(frames)} of {len(result['frames'])} frames were imagined", end="")
    print(f" (from {frames[0]} on)" if frames else "")
    if result["removed"]:
        print(f"without {result['removed']['object'] or 'the object'} in slot {result['removed']['slot']}")
    for note in result["notes"]:
        print(f"note: {note}")


def convert(arguments, _) -> None:
    import shutil

    from cjepa_hf.data.extract import usual_image_processor
    from cjepa_hf.hub.convert import (
        config_file,
        convert_original_checkpoint,
        convert_original_slots,
        is_original_slots,
    )
    from cjepa_hf.training.trainer import save_model_folder

    _check_released_name(arguments.file, arguments.config)
    output = Path(arguments.output_dir)
    columns = {name: getattr(arguments, name) for name in ("actions", "proprio", "states")}
    if is_original_slots(arguments.file):
        entry = _slots_entry(arguments.config) if arguments.config else None
        keywords = {"frame_skip": arguments.frame_skip}
        if entry:
            keywords["frame_skip"] = arguments.frame_skip or entry["dataset"]["frame_skip"]
            keywords["encoder"] = {"name": entry["encoder"], "revision": None, "config_hash": None}
            keywords["shape"] = (entry["dataset"]["num_slots"], entry["dataset"]["slot_size"])
        folder = convert_original_slots(arguments.file, **columns, output_dir=output, **keywords)
        if entry:
            from cjepa_hf.data.slots import write_text
            from cjepa_hf.hub.cards import card

            write_text(folder / "source.json", json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
            write_text(folder / "README.md", card(folder))
        print((folder / "slot_dataset.json").read_text() if arguments.json else f"Slots in {folder}")
        return
    if given := [f"--{name}" for name, value in columns.items() if value]:
        raise ValueError(f"{arguments.file} holds no slots: leave {' and '.join(given)} out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output-dir {output} is not empty: choose a new folder")
    model = convert_original_checkpoint(arguments.file, arguments.config)
    files = {}
    if arguments.config:
        beside = config_file(arguments.config).parent
        for name in ("preprocessor_config.json", "processor_config.json", "source.json"):
            if (beside / name).is_file():
                files[name] = (beside / name).read_text(encoding="utf-8")
    processor = usual_image_processor(getattr(model.config, "slot_encoder_config", None) or model.config)
    if processor is not None:
        files.setdefault("preprocessor_config.json", processor.to_json_string())
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        save_model_folder(model, temporary, files)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    report = {"folder": str(output), "model_type": model.config.model_type, "num_parameters": size}
    print(json.dumps(report) if arguments.json else f"{type(model).__name__} ({size:,} parameters) in {output}")


def _check_released_name(file: str, config: str | None) -> None:
    """Files of the same shapes are told apart by their names alone: one under another's entry would get its numbers."""
    from cjepa_hf.hub.convert import hub_configs

    sources = {name: json.loads((folder / "source.json").read_text()) for name, folder in hub_configs().items()}
    files = {name: Path((source.get("original") or {}).get("file") or "").name for name, source in sources.items()}
    entry = next((name for name, released in files.items() if released == Path(file).name), config)
    if config in sources and entry != config:
        raise ValueError(
            f"{Path(file).name} was released as the file of --config {entry}, not of {config}, whose settings and numbers "
            f"are others: pass {entry}, or rename the file if its name is wrong"
        )


def _slots_entry(name: str) -> dict:
    """source.json of the entry of a slot dataset."""
    from cjepa_hf.hub.convert import hub_configs

    path = hub_configs().get(name, Path(name)) / "source.json"
    entry = json.loads(path.read_text()) if path.is_file() else {}
    if "dataset" not in entry:
        names = ", ".join(known for known in hub_configs() if known.endswith("-slots"))
        raise ValueError(f"--config {name} is no slot dataset, and the file holds slots: give one of {names}")
    return entry


def write_card(arguments, _) -> None:
    from cjepa_hf.hub.cards import card
    from cjepa_hf.hub.convert import hub_configs

    if bool(arguments.all) == bool(arguments.folder):
        raise ValueError("give a folder, or --all DIR for the cards of all entries of hub_configs")
    if arguments.all:
        if arguments.repo_id or arguments.results or arguments.output:
            raise ValueError("--repo-id, --results and --output belong to one folder: leave them out with --all")
        texts = {
            Path(arguments.all) / f"{name}.md": card(folder, f"{arguments.owner}/{name}")
            for name, folder in hub_configs().items()
        }
    else:
        folder = hub_configs().get(arguments.folder, Path(arguments.folder))
        output = Path(arguments.output) if arguments.output else folder / "README.md"
        if output.exists() and not arguments.force:
            raise ValueError(f"{output} is there already: --force replaces it, --output writes elsewhere")
        texts = {output: card(folder, arguments.repo_id, arguments.results)}
    from cjepa_hf.data.slots import write_text

    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(f"{len(texts)} cards in {arguments.all}" if arguments.all else f"Card in {path}")


def publish(arguments, _) -> None:
    from cjepa_hf.hub.publish import publish

    report = publish(
        arguments.folder,
        arguments.repo_id,
        revision=arguments.revision,
        private=arguments.private,
        create_pr=arguments.create_pr,
        with_code=arguments.with_code,
        dry_run=arguments.dry_run,
        commit_message=arguments.message,
    )
    if arguments.json:
        print(json.dumps(report))
        return
    verb = "would go" if arguments.dry_run else "uploaded"
    print(f"{report['repo_type']} {report['repo_id']}, branch {report['revision'] or 'main'}: {verb}")
    for name, size in report["files"].items():
        print(f"  {size:>13,} {name}")
    if report["left_out"]:
        print(f"  stays: {', '.join(report['left_out'])}")
    if report["url"]:
        print(report["url"])


if __name__ == "__main__":
    sys.exit(main())
