// Package scaler says how many Instances every Function should have.
//
// [Decide] is pure: time, policy, what it said before and what was measured go in, a number with its reason comes out, so that
// a trace can be replayed through the very code that runs. Loop feeds it: it is the LoadService that gateways report to, keeps a
// [Window] for each Function and gateway, decides each second and at once when an idle Function gets its first request, and
// tells its Pool, which owns the Instances.
//
// What always holds: missing samples never mean zero. Where measurements do not cover the window, the scale may grow but not
// shrink. An Instance that is in use now is never decided away to zero.
package scaler
