"""The sample function in Python: flask, with numpy and pandas imported at start, as data people write them.

It follows the contract that every sample keeps; see package images."""

import os
import platform
import signal
import threading
import time

import flask
import numpy
import pandas
from werkzeug import serving

GRACE = 10  # seconds that requests under way may take after SIGTERM

app = flask.Flask(__name__)
frame = pandas.DataFrame({"group": numpy.arange(60) % 3, "value": numpy.arange(60.0)})


@app.get("/")
def describe():
    means = frame.groupby("group")["value"].mean()
    return {
        "runtime": "python",
        "version": platform.python_version(),
        "numpy": numpy.__version__,
        "pandas": pandas.__version__,
        "means": means.tolist(),
    }


@app.route("/echo", methods=["GET", "POST", "PUT"])
def echo():
    stream, length = flask.request.stream, flask.request.content_length
    answer = flask.Response(iter(lambda: stream.read(64 * 1024), b""), content_type=flask.request.content_type)
    if length is not None:
        answer.content_length = length
    return answer


@app.route("/sleep", methods=["GET", "POST"])
def sleep():
    ms = flask.request.args.get("ms", "")
    if not (ms.isascii() and ms.isdigit() and len(ms) < 10):
        return "ms must be a number of milliseconds\n", 400
    time.sleep(int(ms) / 1000)
    return ms + "\n"


@app.get("/env")
def env():
    return flask.Response(os.environ.get(flask.request.args.get("name", ""), ""), mimetype="text/plain")


@app.route("/log", methods=["GET", "POST"])
def log():
    print(flask.request.args.get("line", ""), flush=True)
    return "", 204


class Handler(serving.WSGIRequestHandler):
    """Keeps connections open, answers without Nagle's delay, logs nothing of its own and knows how many requests run."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    changed = threading.Condition()
    running = 0

    def run_wsgi(self):
        self.count(1)
        try:
            super().run_wsgi()
        finally:
            self.count(-1)

    @classmethod
    def count(cls, change):
        with cls.changed:
            cls.running += change
            cls.changed.notify_all()

    @classmethod
    def drain(cls, seconds):
        with cls.changed:
            cls.changed.wait_for(lambda: cls.running == 0, seconds)

    def log(self, *_):
        pass


def main():
    port = int(os.environ.get("PORT") or 8080)
    server = serving.make_server("0.0.0.0", port, app, threaded=True, request_handler=Handler)
    # shutdown waits for serve_forever, which runs in the very thread that receives the signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"function: python listening on port {port}", flush=True)
    server.serve_forever()
    Handler.drain(GRACE)


if __name__ == "__main__":
    main()
