"""Makes an encoder whose "slots" are the patches of a frozen vision backbone, for examples/train_dino_wm.py.

    python examples/make_patch_encoder.py --output_dir runs/patches --episodes runs/episodes

    python examples/make_patch_encoder.py --output_dir runs/dinov2 --backbone facebook/dinov2-small --grid_size 14 --merge 1

The backbone is any vision model of transformers (a folder or a Hub id); by default the small slot encoder that ships, whose
32 x 32 features become 8 x 8 tokens of 2 x 2 averages. `--episodes` standardizes every channel on frames of these videos or
episodes, which the shipped encoder needs; DINOv2's features have a scale of their own.
"""

import argparse
import itertools

import torch

from cjepa_hf import ColorIsaImageProcessor, PatchEncoderModel, bundled_checkpoint
from cjepa_hf.data.video import open_source


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--backbone", default=str(bundled_checkpoint("push_t")), help="default: the shipped slot encoder"
    )
    parser.add_argument("--image_size", type=int, help="pixels (default: 196, or what the shipped encoder takes)")
    parser.add_argument("--grid_size", type=int, default=8, help="tokens along one side (default: %(default)s)")
    parser.add_argument(
        "--merge", type=int, default=2, help="averages along one side of a token (default: %(default)s)"
    )
    parser.add_argument("--episodes", help="source of frames to standardize the features on")
    parser.add_argument("--num_videos", type=int, default=100, help="of its first split (default: %(default)s)")
    args = parser.parse_args()

    encoder = PatchEncoderModel.from_backbone(
        args.backbone, image_size=args.image_size, grid_size=args.grid_size, merge=args.merge
    )
    processor = ColorIsaImageProcessor(size=encoder.config.image_size)
    if args.episodes:
        videos = next(iter(open_source(args.episodes).splits.values()))
        frames = [next(video.chunks(16, stride=5)) for video in itertools.islice(videos, args.num_videos)]
        encoder.set_feature_statistics(torch.cat([processor(clip)["pixel_values"] for clip in frames]))
    encoder.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    print(f"{encoder.config.num_slots} tokens of size {encoder.config.slot_size} per frame, in {args.output_dir}")


if __name__ == "__main__":
    main()
