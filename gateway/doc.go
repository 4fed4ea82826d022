// Package gateway is Hearth's front door. It routes a request to a Function, keeps it in a bounded queue while an Instance
// of the Function is activated, never gives an Instance more requests than its concurrency, and proxies in both directions
// as a stream.
//
// What it knows comes from poolmanager, through the interface Pool: a stream of Endpoints (Watch), an Instance on demand
// (Allocate), and measured load in return (Report). It keeps what it last knew when poolmanager is away, so that traffic to
// Instances that serve goes on without it.
//
// How it is made: table holds what is known of all Functions; function is the admission of one Function (endpoints, their
// requests in flight, the queue) behind one mutex; dispatch turns a queue into Allocate calls; exchange is one request;
// health is about Instances that fail, which are put out of rotation and given back.
//
// The status codes that are the gateway's own, each with a JSON body {error, reason, next_step}:
//
//	404  no such Function
//	429  the Function's queue is full; with Retry-After. The caller's load on this Function is the cause.
//	502  the Instance broke after the request was sent to it, so that it cannot be sent again
//	503  no Instance can be had: none free in the pool, poolmanager away, or the Function itself fails to start (the reason
//	     has its own words); with Retry-After
//	504  the Function's time-out passed in the queue, or before the Instance's first byte
//	400, 405, 408, 499  the request's own fault; 499 only in metrics, for a client that has gone
package gateway
