"""A CNI meta plugin for tests, as Multus is one: each of `delegates` makes an interface, the first the pod's own.

Its configuration: {"delegates": [{...}, ...], "failAt": "ADD 2"}. Delegate 0 gets the interface that was asked for,
delegate n the interface net<n>. The result is delegate 0 alone. With `failAt` the command fails before that one's turn.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run one command."""
    config, command = json.load(sys.stdin), os.environ["CNI_COMMAND"]
    order = list(enumerate(config["delegates"]))
    results, errors = [], []
    for number, delegate in order if command != "DEL" else reversed(order):
        if config.get("failAt") == f"{command} {number}":
            return refuse(f"told to fail at {command} {number}")
        name = f"{config['name']}-{number}" if number else config["name"]
        request = delegate | {"cniVersion": config["cniVersion"], "name": name}
        done = subprocess.run(
            [find(delegate["type"])],
            input=json.dumps(request).encode(),
            env=os.environ | ({"CNI_IFNAME": f"net{number}"} if number else {}),
            capture_output=True,
            check=False,
        )
        if done.returncode and command != "DEL":
            return refuse(done.stdout.decode())
        if done.returncode:
            errors.append(done.stdout.decode())
        results.append(done.stdout.decode())
    if errors:
        return refuse("; ".join(errors))
    if command == "ADD":
        print(results[0])
    return None


def find(kind: str) -> str:
    """Return a plugin's program."""
    return next(f"{place}/{kind}" for place in os.environ["CNI_PATH"].split(":") if Path(place, kind).exists())


def refuse(words: str) -> None:
    """Fail as a plugin does."""
    print(json.dumps({"code": 999, "msg": words}))
    sys.exit(1)


if __name__ == "__main__":
    main()
