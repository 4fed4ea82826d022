package instance

import (
	"bytes"
	"context"
	"io"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// What a fake containerd is made of.
type (
	Sandbox       = sandbox
	Image         = image
	Rootfs        = rootfs
	Container     = container
	ContainerInfo = containerInfo
	Exit          = exit
)

// Labels that a restarted engine reads.
const (
	LabelInstance, LabelClaim, LabelEpoch, LabelServing = labelInstance, labelClaim, labelEpoch, labelServing
	LabelFunction, LabelRevision, LabelPort             = labelFunction, labelRevision, labelPort
)

// NewWithBackend makes an Engine over a fake containerd.
func NewWithBackend(cfg Config, b backend) (*Engine, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return newEngine(cfg, b)
}

// Watch is WatchInstances without a connection.
func (e *Engine) Watch(ctx context.Context, send func(*hearthv1.WatchInstancesResponse) error) error {
	return e.watch(ctx, send)
}

// StreamLogs is Logs without a connection.
func (e *Engine) StreamLogs(ctx context.Context, req *hearthv1.LogsRequest, send func(*hearthv1.LogsResponse) error) error {
	return e.streamLogs(ctx, req, send)
}

// LogPath makes an Instance's log file.
func (e *Engine) LogPath(function, instance string) (string, error) {
	return e.logs.create(function, instance)
}

// Reconcile compares with containerd now.
func (e *Engine) Reconcile(ctx context.Context) error { return e.reconcile(ctx) }

// SplitLines returns the lines that are sent when a file's text arrives in two parts.
func SplitLines(first, second []byte) ([][]byte, error) {
	var lines [][]byte
	r := &logReader{send: func(l *hearthv1.LogsResponse) error { lines = append(lines, l.Line); return nil }}
	p := &position{}
	for i, part := range [][]byte{first, second} {
		var from io.Reader = bytes.NewReader(part)
		if err := r.sendLines(context.Background(), "x", p, from, i == 1); err != nil {
			return nil, err
		}
	}
	return lines, nil
}

// ConnectError gives an error its code.
func ConnectError(err error) error { return connectError(err) }
