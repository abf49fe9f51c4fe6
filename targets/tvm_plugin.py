"""Tell TVM our target tags: `tvm.target.Target("llamac/sm8650-cpu")`.

TVM calls `register` at the end of `import tvm` (entry-point group `tvm.backends`), in every process
that imports it, and turns a failure into a warning. So this module imports nothing that imports
TVM in turn, it may be called twice, and it does nothing where only TVM's runtime is loaded.
With TVM_DEVICE_BACKEND_AUTOLOAD=0 TVM does not call it; whoever needs the tags calls it himself.
"""

from __future__ import annotations

from llamac.runtime.errors import SocInvalid
from llamac.targets.soc import cpu_tvm_target, load_soc, soc_files


def cpu_tag(soc_name: str) -> str:
    """Return the tag of a SoC's CPU, "llamac/sm8650-cpu"."""
    return f"llamac/{soc_name}-cpu"


def register() -> None:
    """Register one tag per SoC."""
    import tvm.base  # noqa: PLC0415 (this module may be imported first, and TVM asks for it)

    if tvm.base._RUNTIME_ONLY:  # no compiler in this process: there are no targets to name
        return
    from tvm.target import list_tags, register_tag  # noqa: PLC0415 (fails if runtime only)

    known = set(list_tags() or ())
    for name, path in soc_files().items():
        if cpu_tag(name) in known:
            continue
        try:
            register_tag(cpu_tag(name), cpu_tvm_target(load_soc(path)))
        except SocInvalid:  # a user's broken file must not break `import tvm`; compiling names it
            continue
