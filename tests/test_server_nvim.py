# SPDX-License-Identifier: Apache-2.0
"""Runs tests/test_server_nvim.lua inside Debian's Neovim against the server."""
import os
import shutil
import subprocess
import sys

from test_server_lib import Server

NVIM = shutil.which("nvim")
if not NVIM:
    print("SKIP: nvim is not installed (apt install neovim)")
    sys.exit(77)

with Server() as server:
    environment = dict(os.environ, POLDER_ADDRESS="%s:%d" % server.address, POLDER_UNIX=server.unix,
                       XDG_STATE_HOME=server.folder.name, XDG_DATA_HOME=server.folder.name,
                       XDG_CONFIG_HOME=server.folder.name, XDG_CACHE_HOME=server.folder.name)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "test_server_nvim.lua")
    run = subprocess.run([NVIM, "--headless", "-u", "NONE", "-i", "NONE", "-n", "-c", "luafile " + script],
                         env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         stdin=subprocess.DEVNULL, timeout=60)
    print(run.stdout)
    assert run.returncode == 0 and "nvim: all good" in run.stdout, run.returncode
