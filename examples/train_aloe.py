"""Trains ALOE to answer questions in CLEVRER's format from the slots of the videos.

    python examples/train_aloe.py examples/aloe/small.yaml --dataset runs/slots --questions questions/train.json \
        --validation_questions questions/validation.json --output_dir runs/aloe

The same with `--text_only true` and another folder is the baseline that sees the words alone; `--seed 1` a second run.
`python -m cjepa_hf.evaluation.clevrer --help` compares them. The same command continues an interrupted run; `--help`
lists every argument; `examples/aloe/clevrer.yaml` is the size of the released code.
"""

from cjepa_hf.training.aloe import main

if __name__ == "__main__":
    main()
