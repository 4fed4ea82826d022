package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hearth-serverless/hearth/bench/faults"
)

// withFault pulls from a registry with a fault.
func withFault(fault faults.Fault) func(context.Context, *victim) ([]time.Duration, error) {
	return func(ctx context.Context, v *victim) ([]time.Duration, error) {
		r, err := v.serve(ctx, fault)
		if err != nil {
			return nil, err
		}
		defer r.stop()
		ref := v.ref(r, v.image)
		free, err := freeBytes(v.fs.Dir)
		if err != nil {
			return nil, err
		}
		took, err := v.pull(ctx, ref)
		times := []time.Duration{took}
		switch {
		case took > v.deadline, fault.Want == faults.Right && err != nil:
			return times, err
		case fault.Want == faults.Refused && err == nil:
			return times, errors.New("the pull says that it is right")
		case err != nil:
			return times, v.clear(ctx, err)
		}
		left, err := freeBytes(v.fs.Dir)
		if err != nil {
			return times, err
		}
		v.typical, v.used = cmp.Or(v.typical, took), cmp.Or(v.used, free-left) // as of the first pull
		return times, v.same(ctx, ref, v.image)
	}
}

// clear says whether an error is: it must name one of the image's layers.
func (v *victim) clear(ctx context.Context, pulled error) error {
	layers, err := v.layers(ctx, v.image)
	if err != nil {
		return err
	}
	for _, l := range layers {
		if strings.Contains(pulled.Error(), l.Digest) {
			return nil
		}
	}
	return fmt.Errorf("the error names no layer: %w", pulled)
}

// registryDown starts a container of an image whose registry is gone.
func registryDown(ctx context.Context, v *victim) ([]time.Duration, error) {
	r, err := v.serve(ctx, faults.Fault{})
	if err != nil {
		return nil, err
	}
	defer r.stop()
	ref := v.ref(r, v.image)
	if _, err := v.pull(ctx, ref); err != nil {
		return nil, err
	}
	r.stop()
	ctx, cancel := context.WithTimeout(ctx, v.deadline)
	defer cancel()
	took, err := v.node.run(ctx, ref)
	if err != nil {
		return nil, err
	}
	return []time.Duration{took}, v.same(ctx, ref, v.image)
}

// sharedLayers pulls two images at once that have their base in common.
func sharedLayers(ctx context.Context, v *victim) ([]time.Duration, error) {
	r, err := v.serve(ctx, faults.Fault{})
	if err != nil {
		return nil, err
	}
	defer r.stop()
	both := []string{v.image, v.other}
	times := make([]time.Duration, len(both))
	v.pulled = append(v.pulled, v.ref(r, v.other), v.ref(r, v.image))
	var group errgroup.Group
	pulling, cancel := context.WithTimeout(ctx, v.deadline)
	defer cancel()
	for i, image := range both {
		group.Go(func() (err error) {
			times[i], err = v.node.pull(pulling, v.ref(r, image))
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	times = []time.Duration{slices.Max(times)}
	for _, image := range both {
		layers, err := v.layers(ctx, image)
		if err != nil {
			return times, err
		}
		for _, l := range layers {
			if sent := r.Sent(l.Digest); sent > l.Bytes {
				return times, fmt.Errorf("of layer %s of %s, which has %d bytes, %d were sent", l.Digest, image, l.Bytes, sent)
			}
		}
		if err := v.same(ctx, v.ref(r, image), image); err != nil {
			return times, fmt.Errorf("%s: %w", image, err)
		}
	}
	return times, nil
}

// diskFull leaves less space than the image takes, and then gives it back.
func diskFull(ctx context.Context, v *victim) (times []time.Duration, err error) {
	r, err := v.serve(ctx, faults.Fault{})
	if err != nil {
		return nil, err
	}
	defer r.stop()
	shares := []int64{10, 50, 90}
	if v.o.Quick {
		shares = shares[1:2]
	}
	for _, percent := range shares {
		took, err := v.fill(ctx, r, v.used*percent/100)
		times = append(times, took)
		if err != nil {
			return times, fmt.Errorf("with space for %d %% of the image: %w", percent, err)
		}
	}
	return times, nil
}

// fill pulls with so many bytes free, and then again.
func (v *victim) fill(ctx context.Context, r *front, leave int64) (time.Duration, error) {
	free, err := freeBytes(v.fs.Dir)
	if err != nil {
		return 0, err
	}
	filler, err := os.Create(filepath.Join(v.fs.Dir, "filler"))
	if err != nil {
		return 0, err
	}
	defer filler.Close()
	if err := unix.Fallocate(int(filler.Fd()), 0, 0, free-leave); err != nil {
		return 0, errors.Join(fmt.Errorf("fill the disk: %w", err), os.Remove(filler.Name()))
	}
	ref := v.ref(r, v.image)
	took, pulled := v.pull(ctx, ref)
	if err := os.Remove(filler.Name()); err != nil {
		return took, err
	}
	if err := errors.Join(filler.Close(), syncFS(v.fs.Dir)); err != nil { // only then is its space free
		return took, err
	}
	if pulled == nil {
		return took, errors.New("the pull says that it is right")
	}
	if status.Code(pulled) != codes.ResourceExhausted && !strings.Contains(pulled.Error(), unix.ENOSPC.Error()) {
		return took, fmt.Errorf("the error does not say what is full: %w", pulled)
	}
	if _, err := v.pull(ctx, ref); err != nil {
		return took, fmt.Errorf("when there is space again: %w", err)
	}
	if err := v.same(ctx, ref, v.image); err != nil {
		return took, err
	}
	return took, v.clean(ctx)
}

// freeBytes on the file system of dir.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
	return int64(st.Bfree) * st.Bsize, nil // root may use what is reserved
}

// killing kills one of the node's processes, by its place among them, at so many random moments of a pull. The pull may fail then;
// the next one may not. The time is that from the beginning until all was right.
func killing(which, times int) func(context.Context, *victim) ([]time.Duration, error) {
	return func(ctx context.Context, v *victim) (took []time.Duration, err error) {
		r, err := v.serve(ctx, faults.Fault{})
		if err != nil {
			return nil, err
		}
		defer r.stop()
		for range times {
			moment := time.Duration(rand.Int64N(int64(max(v.typical, time.Second))))
			t, err := v.killAt(ctx, v.ref(r, v.image), which, moment)
			took = append(took, t)
			if err != nil {
				return took, fmt.Errorf("killed after %v: %w", moment.Round(time.Millisecond), err)
			}
		}
		return took, nil
	}
}

func (v *victim) killAt(ctx context.Context, ref string, which int, moment time.Duration) (time.Duration, error) {
	pids, err := v.node.processes()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	ended := make(chan error, 1)
	go func() {
		_, err := v.pull(ctx, ref)
		ended <- err
	}()
	select {
	case <-ctx.Done():
	case <-time.After(moment):
	}
	killed := unix.Kill(pids[which], unix.SIGKILL)
	first := <-ended
	if killed != nil {
		return time.Since(start), fmt.Errorf("kill -9 of process %d: %w", pids[which], killed)
	}
	if err := v.returned(ctx, pids[which], which); err != nil {
		return time.Since(start), err
	}
	if err := v.retry(ctx, ref); err != nil {
		return time.Since(start), fmt.Errorf("the pulls after (the one at that moment: %v): %w", first, err)
	}
	took := time.Since(start)
	if err := v.same(ctx, ref, v.image); err != nil {
		return took, err
	}
	return took, v.clean(ctx)
}

// retry pulls until it succeeds or the deadline is there, as a kubelet does.
func (v *victim) retry(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, v.deadline)
	defer cancel()
	for {
		_, err := v.node.pull(ctx, ref)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// returned waits until a process has been started again, and the node pulls again.
func (v *victim) returned(ctx context.Context, pid, which int) error {
	ctx, cancel := context.WithTimeout(ctx, v.deadline)
	defer cancel()
	for {
		pids, err := v.node.processes()
		if err == nil && pids[which] != pid && pids[which] != 0 {
			if err = v.node.ready(ctx); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("what was killed is not back within %v: %w", v.deadline, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
