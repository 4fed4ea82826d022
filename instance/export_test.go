package instance

import (
	"bytes"
	"context"
	"io"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/sidecar/control"
)

// What a fake containerd is made of.
type (
	Sandbox       = sandbox
	Image         = image
	Rootfs        = rootfs
	Container     = container
	Launcher      = launcher
	Record        = record
	ContainerInfo = containerInfo
	Exit          = exit
	Sidecar       = sidecar
)

// Labels that a restarted engine reads.
const (
	LabelInstance, LabelClaim, LabelEpoch   = labelInstance, labelClaim, labelEpoch
	LabelFunction, LabelRevision, LabelPort = labelFunction, labelRevision, labelPort
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

// LogPath is an Instance's log file, which is made if it is not there.
func (e *Engine) LogPath(function, instance string) (string, error) {
	path := filepath.Join(e.logs.dir(function), instance+logSuffix)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	output := filepath.Join(e.cfg.Root, instance)
	if err := os.WriteFile(output, nil, 0o600); err != nil {
		return "", err
	}
	return e.logs.claim(function, instance, output)
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

// Detach mounts a snapshot where nobody sees it.
func Detach(mounts []mount.Mount, scratch string) (*os.File, error) { return detach(mounts, scratch) }

// RelativeLowers shortens an overlay's options.
func RelativeLowers(options []string) (base, joined string) { return relativeLowers(options) }

// SidecarServe is what a Revision's sidecar is told.
func SidecarServe(ip string, r *hearthv1.Revision) control.Serve {
	return sidecarServe(netip.MustParseAddr(ip), r)
}

// WithDefaults is the Config as the engine takes it.
func (c Config) WithDefaults() (Config, error) { return c.withDefaults() }
