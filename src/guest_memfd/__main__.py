"""``python -m guest_memfd``: the command `gmem`, where its folder is not on the PATH."""

import sys

from guest_memfd.cli.main import main

sys.exit(main())
