"""The sample Function in Python: answers with what pandas works out."""

import functions_framework
import pandas

frame = pandas.DataFrame({"group": [n % 3 for n in range(60)], "value": range(60)})


@functions_framework.http
def hello(request):
    name = request.args.get("name", "world")
    means = frame.groupby("group")["value"].mean()
    return {"hello": name, "means": means.tolist()}
