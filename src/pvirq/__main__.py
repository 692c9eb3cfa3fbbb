"""python -m pvirq: the same as the `pvirq` command."""

from pvirq.cli.main import main

if __name__ == "__main__":
    main()
