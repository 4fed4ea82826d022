// Package sidecar stands before a Function in its Instance: the gateway's requests come to it, and go on to the Function over
// loopback. It holds the Function's concurrency limit, lets a bounded queue wait, drains, answers probes, and tells nodeagent
// when the Function accepts, when it is idle and when it refuses. It is not frozen when the Function is.
//
// To the gateway it is the Function: it changes nothing that is said, and when a connection to the Function cannot be had or
// breaks off before an answer, it breaks off its own, so that the gateway judges the Instance as if it had none. Its own answers
// are those about the queue and the deadline.
//
// It serves one Function and never another: nodeagent names it once, through package control, and nothing listens before.
//
// It has to be small, for every Instance has one: net/http and the standard library, nothing else.
package sidecar
