package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/host"
)

const (
	readyTime   = time.Minute           // for one daemon to become ready
	probePause  = 20 * time.Millisecond // between two attempts
	probeTime   = 5 * time.Second       // for one attempt
	maxRestarts = 5                     // of a daemon while the deployment comes up; then it is given up
	tailLines   = 15                    // of its log that are shown then
)

// probe returns nil when something is ready, otherwise why it is not.
type probe func(context.Context) error

func probeDial(network, address string) probe {
	return func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

// probeReadyz asks a daemon's admin listener.
func probeReadyz(socket string) probe {
	return func(ctx context.Context) error {
		client := daemon.UnixClient(socket)
		defer client.CloseIdleConnections()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://hearth/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return errors.New("does not answer")
		}
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return errors.New(strings.TrimSpace(string(why)))
	}
}

// await waits until a daemon is ready; it gives up when the daemon has ended too often or the time is over.
func (s *supervisor) await(ctx context.Context, d spec) error {
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, probeTime)
		err := d.ready(attempt)
		done()
		if err == nil {
			return nil
		}
		if s.status.restarts(d.name) >= maxRestarts || !host.Pause(ctx, probePause) {
			return fmt.Errorf("%s does not become ready: %w; the end of its log, %s:\n%s", d.name, err, d.cmd.log, tail(d.cmd.log, tailLines))
		}
	}
}
