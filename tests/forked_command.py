"""Stand for a command in a shell: ask the test's `forks.Commands` to run it, and end as it ended.

A program of its own, which imports next to nothing: FORKED_COMMANDS names the socket, and the arguments are the command.
"""

import os
import sys
from multiprocessing.connection import Client

with Client(os.environ["FORKED_COMMANDS"]) as server:
    server.send((sys.argv[1:], os.getcwd(), dict(os.environ)))
    code, stdout, stderr = server.recv()
sys.stdout.buffer.write(stdout)
sys.stderr.buffer.write(stderr)
sys.exit(code)
