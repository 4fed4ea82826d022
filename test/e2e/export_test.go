package e2e

import "time"

// Count reads an answer of Prometheus's API.
var Count = count

// Filled has Grafana's variables filled in.
func Filled(expr string, window time.Duration) string { return variables(window).Replace(expr) }

// Ask counts the numbers in a Prometheus's answer to a query.
var Ask = ask
