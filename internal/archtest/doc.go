// Package archtest holds the house to its plan: which room stands on which floor, who owns which third-party family, and
// that every package says what it is for. It has no code of its own, only the tests; docs/ARCHITECTURE.md explains the plan.
package archtest
