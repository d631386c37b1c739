"""A client that replays the scenarios needs neither torch nor transformers."""

import subprocess
import sys


def test_scenarios_load_without_torch() -> None:
    code = (
        "import sys; from saeguard_server.demo import scenarios; scenarios.load_demonstration();"
        "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys(), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
