"""`python -m fastseq.info`: the report of `fastseq.info()`."""

import sys

from fastseq._info import main

if __name__ == "__main__":
    main()
else:
    sys.modules[__name__] = main  # type: ignore[assignment]  # `import fastseq.info` leaves the function in place
