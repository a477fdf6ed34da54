"""What `lrd launch` starts on each rank: lrd.train, also quiet before it can handle signals.

Python would answer a Ctrl-C while torch is imported with a trace-back of each rank.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from lrd.train import main

    main()
