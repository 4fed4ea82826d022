package gateway

import (
	"fmt"
	"net/http"
	"time"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// statusClientGone is nginx's number for a client that left before its answer; it shows in metrics only.
const statusClientGone = 499

// codeNoCapacity refuses for want of Instances that may be started.
const codeNoCapacity = "no_capacity"

// refusal is an answer of the gateway itself. It is an error so that it can end an exchange wherever it is.
type refusal struct {
	status     int
	code       string // constant, for programs
	reason     string // for people
	next       string // what the reader can do
	retryAfter time.Duration
}

func (r *refusal) Error() string { return r.code + ": " + r.reason }

// write answers with the refusal.
func (r *refusal) write(w http.ResponseWriter) {
	(&relay.Refusal{Status: r.status, Code: r.code, Reason: r.reason, Next: r.next, RetryAfter: r.retryAfter}).Write(w)
}

func unknownFunction(what string) *refusal {
	return &refusal{
		status: http.StatusNotFound, code: "unknown_function",
		reason: "no function answers to " + what,
		next:   "list the functions with `hearth ps`, or deploy one with `hearth deploy`; call it at NAME.DOMAIN or /fn/NAME",
	}
}

func notLearned() *refusal {
	return &refusal{
		status: http.StatusServiceUnavailable, code: "starting", retryAfter: time.Second,
		reason: "this gateway has not heard from poolmanager yet, so it knows no function",
		next:   "try again; if it lasts, look at poolmanager with `hearth status`",
	}
}

func queueFull(name string, bound int) *refusal {
	return &refusal{
		status: http.StatusTooManyRequests, code: "queue_full", retryAfter: time.Second,
		reason: fmt.Sprintf("%d requests wait for an instance of %s already, which is its bound", bound, name),
		next:   "send less at once, or raise the function's max, concurrency or queue",
	}
}

func tooLate(name string, timeout time.Duration, where string) *refusal {
	return &refusal{
		status: http.StatusGatewayTimeout, code: "timeout",
		reason: fmt.Sprintf("%s: %s within its time-out of %s", name, where, timeout),
		next:   "see `hearth logs " + name + "` and `hearth ps " + name + "`; raise the function's timeout if it needs longer",
	}
}

func noInstance(code, name, reason, next string, retryAfter time.Duration) *refusal {
	return &refusal{
		status: http.StatusServiceUnavailable, code: code, retryAfter: max(retryAfter, time.Second),
		reason: name + ": " + reason, next: next,
	}
}

func broken(name, instance string, err error) *refusal {
	return &refusal{
		status: http.StatusBadGateway, code: "instance_broke",
		reason: fmt.Sprintf("%s: instance %s broke off after the request was sent to it: %v", name, instance, err),
		next:   "see `hearth logs " + name + "`; send the request again if it is safe to run twice",
	}
}

func badRequest(reason string) *refusal {
	return &refusal{status: http.StatusBadRequest, code: "bad_request", reason: reason, next: "correct the request"}
}

// clientGone is never seen by anyone but metrics.
func clientGone() *refusal {
	return &refusal{status: statusClientGone, code: "client_gone", reason: "the client left", next: ""}
}
