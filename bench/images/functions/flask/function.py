"""A function of Python and flask, and nothing beside them: what most small services of the web import.

Of the samples' contract it keeps what a start takes; see package images."""

import os
import platform
import signal
import threading

import flask
from werkzeug import serving

app = flask.Flask(__name__)


@app.get("/")
def describe():
    return {"runtime": "flask", "version": platform.python_version()}


def main():
    port = int(os.environ.get("PORT") or 8080)
    server = serving.make_server("0.0.0.0", port, app, threaded=True)
    # shutdown waits for serve_forever, which runs in the very thread that receives the signal.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"function: flask listening on port {port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
