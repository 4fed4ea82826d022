// Package bench measures Hearth side by side with its peers: in one run, on one machine, with interleaved rounds, and with
// every sample kept. A suite is a function that fills a Report; the losses are in it as well.
//
// All suites write the same shape (Report), so that runs can be compared: `case` and `metric` are the same for all systems
// that are compared, `hearth` is the system called hearth.
package bench
