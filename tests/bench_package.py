"""Makes `bench` importable without this repository on the path, where `kernels` would be found."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
