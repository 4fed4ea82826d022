package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// watched reads a body and cancels its request when it has been silent for too
// long. Only time spent in Read counts: a reader that waits for memory is no
// fault of the network.
type watched struct {
	ctx     context.Context // of the request: only asked why it ended
	body    io.Reader
	timeout time.Duration
	timer   *time.Timer
}

// watch returns body under watch; cancel ends its request, whose context is ctx.
func watch(ctx context.Context, cancel context.CancelCauseFunc, body io.Reader, timeout time.Duration) *watched {
	timer := time.AfterFunc(timeout, func() {
		cancel(fmt.Errorf("%w: nothing for %v", errStalled, timeout))
	})
	timer.Stop()
	return &watched{ctx: ctx, body: body, timeout: timeout, timer: timer}
}

// Read implements io.Reader.
func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(w.timeout)
	n, err := w.body.Read(p)
	w.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		if cause := context.Cause(w.ctx); cause != nil {
			err = cause
		}
	}
	return n, err
}
