package cluster

import (
	"context"
	"errors"
	"os"
)

// Temporary starts a cluster in a folder of its own, for who needs one for a while. end takes both away again.
func Temporary(ctx context.Context, progress func(line string)) (kubeconfig, registry string, end func() error, err error) {
	dir, err := os.MkdirTemp("", "hearth-cluster-")
	if err != nil {
		return "", "", nil, err
	}
	c, err := Start(ctx, Config{Dir: dir, Progress: progress})
	if err != nil {
		return "", "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	end = func() error {
		return errors.Join(c.Down(context.WithoutCancel(ctx)), os.RemoveAll(dir))
	}
	return c.Kubeconfig(), c.Registry(), end, nil
}
