#!/usr/bin/env bash
# The whole test suite on a machine with a CUDA GPU, from the tree, uninstalled: tests that take a device run on both.
# bitsandbytes is looked for in .peers as well. More arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=src:.peers PYTHONUNBUFFERED=1
# with many processes (-n) each is to keep to a few cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
python3 - <<'PY'
import bitsandbytes, torch, transformers
print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__, "bitsandbytes", bitsandbytes.__version__)
PY
python3 -m pytest -p no:cacheprovider -p tests.gpu.at_once -p no:benchmark --tb=short "$@"
