"""FlexKV's Python contract, answered by kvring. Not FlexKV: the module has its name so that what
imports it runs on kvring unchanged."""

import importlib.metadata

import kvring

__version__ = kvring.__version__


def _refuse_beside_flexkv() -> None:
    try:
        other = importlib.metadata.distribution("flexkv")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"flexkv {other.version} and kvring-flexkv are both installed, and both provide the module `flexkv`: "
        "run `pip uninstall flexkv kvring-flexkv`, then install the one you want"
    )


_refuse_beside_flexkv()
