"""What `helm test` runs: the API refuses a request without a key, names its model, and answers a question."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

URL, KEY = os.environ["API_URL"], os.environ["EXPERTMESH_API_KEY"]
DEADLINE = time.monotonic() + float(os.environ["TIMEOUT_S"])


def ask(path, body=None, key=KEY):
    """Status and JSON of the answer."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(URL + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=max(1, DEADLINE - time.monotonic())) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


def ready():
    """Whether the mesh says that it is."""
    try:
        with urllib.request.urlopen(URL + "/ready", timeout=10):
            return True
    except OSError as error:
        print("not ready:", error, flush=True)
        return False


while not ready():
    if time.monotonic() > DEADLINE:
        sys.exit("the mesh is not ready")
    time.sleep(2)
status, _ = ask("/v1/models", key="")
if status != 401:
    sys.exit(f"a request without a key was answered with {status}")
status, models = ask("/v1/models")
if status != 200:
    sys.exit(f"the key is not accepted: {status}")
model = models["data"][0]["id"]
question = {"role": "user", "content": os.environ["QUESTION"]}
status, answer = ask("/v1/chat/completions", {"model": model, "messages": [question], "max_tokens": 16})
if status != 200 or not answer["usage"]["completion_tokens"]:
    sys.exit(f"no answer: {status} {answer}")
print(model, "answers:", answer["choices"][0]["message"]["content"])
