// Package scale has the test of many: hundreds of nodes and thousands of Functions, on a real API server with a real scheduler, under the
// real poolmanagers. Nodes are simulated, kubelet and nodeagent of each, for no machine has room for so many; what they keep is noted, so
// that a claim which was lost or made twice is seen.
package scale
