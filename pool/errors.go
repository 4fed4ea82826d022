package pool

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"connectrpc.com/connect"
)

var (
	errNoNode   = errors.New("no node is connected; see the log of nodeagent")
	errShutdown = errors.New("poolmanager is shutting down; ask again")
)

func unavailable(err error) error { return connect.NewError(connect.CodeUnavailable, err) }

func noFunction(name string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("no function %q; list them with `hearth status`", name))
}

func noRuntime(name string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("no runtime %q; list them with `hearth runtime ls`", name))
}

// later is Unavailable with the time after which to ask again, which is at least a second, in the header that HTTP has for it.
func later(now, retry time.Time, err error) error {
	e := connect.NewError(connect.CodeUnavailable, err)
	e.Meta().Set("Retry-After", strconv.Itoa(int(max(1, math.Ceil(retry.Sub(now).Seconds())))))
	return e
}

// message of an error without connect's code before it.
func message(err error) string {
	var e *connect.Error
	if errors.As(err, &e) {
		return e.Message()
	}
	return err.Error()
}
