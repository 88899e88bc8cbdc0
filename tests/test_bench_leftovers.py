# SPDX-License-Identifier: Apache-2.0
"""A benchmark that is killed leaves its state directory; the next one removes it, and none that is in use or young."""
import os
import signal
import subprocess
import sys
import time

BENCH = sys.argv[1]
COMMAND = [BENCH, "--model", "synth:tiny,tied=0", "--mib", "1", "--pool-mib", "8", "--times"]


def there():
    return {name for name in os.listdir("/tmp") if name.startswith("polder-benchmark-")}


def begun(times):
    before = there()
    process = subprocess.Popen(COMMAND + [times], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for name in there() - before:
            if os.path.exists(os.path.join("/tmp", name, "adapters")):
                return process, os.path.join("/tmp", name)
        time.sleep(0.005)
    raise AssertionError("the benchmark made no state directory")


def main():
    killed, left = begun("64")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert os.path.isdir(left)
    young, young_left = begun("64")
    young.send_signal(signal.SIGKILL)
    young.wait()
    os.utime(left, (time.time() - 3600, time.time() - 3600))
    running, used = begun("64")
    running.send_signal(signal.SIGSTOP)  # as long as it lives, the directory is its own
    os.utime(used, (time.time() - 3600, time.time() - 3600))
    assert subprocess.run(COMMAND + ["1"], stdout=subprocess.DEVNULL).returncode == 0
    assert not os.path.exists(left), "what the killed one left is still there"
    assert os.path.isdir(young_left) and os.path.isdir(used)
    running.send_signal(signal.SIGCONT)
    assert running.wait(60) == 0 and not os.path.exists(used)
    os.utime(young_left, (time.time() - 3600, time.time() - 3600))
    assert subprocess.run(COMMAND + ["1"], stdout=subprocess.DEVNULL).returncode == 0
    assert not os.path.exists(young_left)


if __name__ == "__main__":
    main()
