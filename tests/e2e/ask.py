"""Fetches URLs until each answer holds a word, run in a pod. Usage: ask.py WORD URL…"""

import json
import sys
import time
import urllib.request

for url in sys.argv[2:]:
    until = time.monotonic() + 60
    while sys.argv[1] not in (answer := urllib.request.urlopen(url).read().decode()):
        if time.monotonic() > until:
            raise SystemExit(f"{url}: {answer}")
        time.sleep(1)
    print(json.dumps({"url": url, "answer": answer}), flush=True)
