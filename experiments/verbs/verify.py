"""The verb `verify`."""

from argparse import Namespace

from experiments.parity.verify import Options, text
from experiments.parity.verify import verify as compare
from experiments.settings.record import POCKET
from qwen_min.load import expanded, resolve


def verify(args: Namespace) -> int:
    """0 where ours computes what the peer does, else 1."""
    names = Options.__dataclass_fields__.keys() & vars(args).keys()
    asked = {name: getattr(args, name) for name in names}
    if "adapter" in asked:
        asked["adapter"] = expanded(asked["adapter"])
    options, name = Options(**asked), getattr(args, "model", POCKET)
    report = compare(resolve(name, offline=hasattr(args, "offline")), options)
    broken = f", {options.defect} planted into ours" if options.defect else ""
    print(f"{name} beside {options.against}, in float32{broken}\n")
    print(text(report))
    return 0 if report.passed else 1
