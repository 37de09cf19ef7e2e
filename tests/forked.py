"""Runs scripts as a user would, in a process each, but forked from this one, which has imported torch already.

Starting Python and importing torch is 2 to 4 of the 2 to 5 seconds that most scripts of the tests take, two hundred times over. A line of JSON on stdin is
a script with its arguments, the folder it runs in, its environment and the files for its stdout and stderr; a line on stdout is its exit code.
"""
import json
import os
import runpy
import signal
import sys
import traceback

import torch._dynamo  # noqa: F401  (torch's optimisers import it)

for line in sys.stdin:
    command, folder, environment, *files = json.loads(line)
    process = os.fork()
    if process == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
else:
    sys.exit()

# From here on this is the script's process.
os.chdir(folder)
signal.alarm(300)  # seconds, after which it hangs
os.environ.clear()
os.environ.update(environment)
for number, name in enumerate([os.devnull, *files]):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
sys.argv, sys.path[0] = command, os.path.dirname(command[0])
code = 1
try:
    runpy.run_path(command[0], run_name="__main__")
    code = 0
except SystemExit as stop:
    code = stop.code
except BaseException:
    traceback.print_exc()
finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # Python's own end takes torch apart, which takes more than a second
