"""Runs in a container: one kind of access to the image's files, again and again, compared with what the files must be.

reader.py KIND: read, map, exec or stat. /shared has `sums` (sha256sum's), `facts` (size and mode of each file), and `stop`
when it is over. What was seen is printed as JSON.
"""

import hashlib
import json
import mmap
import os
import random
import subprocess
import sys
import time

PIECE = 64 << 10
kind = sys.argv[1]
sums = {}
for line in open("/shared/sums"):
    digest, path = line.rstrip("\n").split("  ", 1)
    sums["/" + path] = digest
facts = {}
for line in open("/shared/facts"):
    size, mode, path = line.rstrip("\n").split(" ", 2)
    facts["/" + path] = (int(size), int(mode, 8))
paths = sorted(sums)
chance = random.Random(kind)


def forget(path):
    """Takes the file out of the page cache, so that the next read is a cold one."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def timed(piece):
    """Runs `piece`; how long the longest one took is reported."""
    start = time.monotonic()
    result = piece()
    seen["longest_s"] = max(seen["longest_s"], time.monotonic() - start)
    return result


def read(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := timed(lambda: file.read(PIECE)):
            digest.update(piece)
    return digest.hexdigest() == sums[path]


def map(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        # From the end: faults come in no order that is read ahead.
        for start in reversed(range(0, len(mapped), PIECE)):
            timed(lambda: mapped[start])
        return hashlib.sha256(mapped).hexdigest() == sums[path]


def execute(path):
    forget("/usr/bin/sha256sum")
    said = timed(lambda: subprocess.run(["/usr/bin/sha256sum", path], check=True, capture_output=True).stdout)
    return said.decode().split(" ")[0].lstrip("\\") == sums[path]


def stat(path):
    listed = os.path.basename(path) in timed(lambda: os.listdir(os.path.dirname(path)))
    found = timed(lambda: os.lstat(path))
    return listed and (found.st_size, found.st_mode & 0o7777) == facts[path]


operation = {"read": read, "map": map, "exec": execute, "stat": stat}[kind]
seen = {"operations": 0, "wrong": [], "failed": [], "longest_s": 0.0}
open("/shared/up-" + kind, "w").close()
while not os.path.exists("/shared/stop"):
    path = chance.choice(paths)
    try:
        if chance.random() < 0.5:
            forget(path)
        if not operation(path):
            seen["wrong"].append(path)
    except Exception as error:
        seen["failed"].append(f"{path}: {error!r}")
    seen["operations"] += 1
print(json.dumps(seen))
