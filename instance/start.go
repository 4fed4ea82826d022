package instance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// startFunction brings a claimed Instance to where its Function listens.
func (e *Engine) startFunction(ctx context.Context, i *instance, a *activation) (err error) {
	if a.runtime != nil {
		return e.startInRuntime(ctx, i, a)
	}
	img, root, err := e.takeRootfs(ctx, a.image, a.trace)
	if img != nil {
		defer e.shelf.refill(img)
	}
	defer root.close()
	i.mu.Lock()
	i.snapshot = root.Key
	if img != nil {
		i.chainID = img.ChainID
	}
	box, launcher, endpoint := i.sandbox, i.launcher, i.endpoint()
	i.mu.Unlock()
	if err != nil {
		return err
	}
	told, cancel := e.expect(box.Netns, endpoint.Port())
	defer cancel()

	begin := time.Now()
	log, err := e.logs.claim(a.revision.Function, i.id, e.outputOf(i.id))
	if err != nil {
		return err
	}
	if a.process, err = functionProcess(i.pod.id, img, root.User, a.revision); err != nil {
		return err
	}
	if err := e.limit(i, launcher, a.revision.GetResources()); err != nil {
		return err
	}
	if a.revision.WritableRoot {
		if err := root.makeRoom(writableBytes(cmp.Or(a.revision.GetResources().GetMemoryBytes(), e.cfg.MemoryBytes))); err != nil {
			return err
		}
	}
	if err := e.mount(ctx, launcher, a); err != nil { // /run goes with the process into its root
		return err
	}
	if err := e.serve(ctx, i, a.revision); err != nil {
		return err
	}
	recorded := e.recordReads(i, root.Layers)
	defer func() { recorded(err) }()
	if err := launcher.Launch(ctx, launch{Root: root, Process: a.process, Writable: a.revision.WritableRoot}); err != nil {
		return err
	}
	a.trace.since(phaseCreate, begin)

	begin = time.Now()
	if err := e.awaitListening(ctx, i, told, endpoint); err != nil {
		return e.withOutput(ctx, err, log)
	}
	a.trace.since(phaseProcess, begin)
	return nil
}

// limit sets what a Function may take, before its process is executed.
func (e *Engine) limit(i *instance, l launcher, r *hearthv1.Resources) error {
	if err := e.cgroups.limit(i.place(), r); err != nil {
		return err
	}
	if memory := r.GetMemoryBytes(); memory > 0 {
		return l.LimitTmp(writableBytes(memory))
	}
	return nil
}

// takeRootfs gets the image and a snapshot of it. An image that turns out to have been removed behind the engine's back is
// fetched again, once.
func (e *Engine) takeRootfs(ctx context.Context, ref string, t *trace) (*image, rootfs, error) {
	for again := true; ; again = false {
		img, err := e.library.ensure(ctx, ref, t)
		if err != nil {
			return nil, rootfs{}, err
		}
		root, err := e.shelf.take(ctx, img, t)
		if err == nil || !again || !errdefs.IsNotFound(err) {
			return img, root, err
		}
		e.library.forget(ref)
	}
}

// expect asks to be told of a listen, or not if there is nobody to ask.
func (e *Engine) expect(netns uint64, port uint16) (<-chan netip.Addr, func()) {
	if e.cfg.Listens == nil {
		return nil, func() {}
	}
	return e.cfg.Listens.Expect(netns, port)
}

// How often the engine tries to connect while it waits. When the kernel tells of listens it is a safety net only: each try is a
// connection that the Function sees.
const (
	dialFirst, dialMost      = time.Millisecond, 25 * time.Millisecond
	dialFirstTold, dialAgain = 250 * time.Millisecond, time.Second
)

// awaitListening waits until the Function's process listens where others can reach it, or has ended.
func (e *Engine) awaitListening(ctx context.Context, i *instance, told <-chan netip.Addr, endpoint netip.AddrPort) error {
	delay, most := dialFirst, dialMost
	if told != nil {
		delay, most = dialFirstTold, dialAgain
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	elsewhere, loopback := netip.Addr{}, e.hasSidecar(i.id) // which reaches it there
	for {
		select {
		case at := <-told:
			if at.IsUnspecified() || at == endpoint.Addr() || loopback && at.IsLoopback() {
				return nil
			}
			elsewhere = at
		case <-timer.C:
			if e.cfg.Dial(ctx, endpoint) == nil {
				return nil
			}
			delay = min(delay*3/2, most)
			timer.Reset(delay)
		case <-i.ready:
			return nil
		case <-i.exited:
			i.mu.Lock()
			defer i.mu.Unlock()
			return fmt.Errorf("the process ended with status %d before it listened on port %d", i.status, endpoint.Port())
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) && elsewhere.IsValid() {
				return fmt.Errorf("the process listens on %s only, where no request can reach it; let it listen on 0.0.0.0:%d: %w",
					elsewhere, endpoint.Port(), ctx.Err())
			}
			return fmt.Errorf("the process does not listen on port %d: %w", endpoint.Port(), ctx.Err())
		}
	}
}

const (
	outputLines = 20
	outputBytes = 4 << 10
	outputDelay = 100 * time.Millisecond
)

// withOutput adds the last lines that the process wrote to the error that it ended with.
func (e *Engine) withOutput(ctx context.Context, err error, log string) error {
	if ctx.Err() == nil {
		sleep(ctx, outputDelay) // the shim copies the output; the end of the process overtakes it
	}
	lines := lastLines(log)
	if lines == "" {
		return err
	}
	return fmt.Errorf("%w; its last output:\n%s", err, lines)
}

// lastLines reads at most outputLines lines and outputBytes bytes from the end of a file, or nothing if it cannot.
func lastLines(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return ""
	}
	text, err := io.ReadAll(io.NewSectionReader(f, max(0, size-outputBytes), outputBytes))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(strings.ToValidUTF8(string(text), "?"), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-outputLines):], "\n")
}

// onExit is told of every process that ends on this containerd.
func (e *Engine) onExit(x exit) {
	for _, i := range e.all() {
		i.mu.Lock()
		box, holder, ending := i.sandbox.ID, i.sandbox.Holder.ID, i.ending
		i.mu.Unlock()
		switch {
		case x.Container == containerID(i.id):
			e.processEnded(i, x.Status)
		case (x.Container == box || x.Container == holder) && !ending: // the kubelet ends a Pod with its container, and then the sandbox
			e.log.Warn("sandbox ended", "instance", i.id)
			e.end(i, hearthv1.State_STATE_GONE, 0)
		}
	}
}

// processEnded notes the end of an Instance's process, the launcher or the Function's. While a Function starts, the activation
// deals with it; otherwise the Instance is gone.
func (e *Engine) processEnded(i *instance, status uint32) {
	i.mu.Lock()
	select {
	case <-i.exited:
	default:
		i.status = status
		close(i.exited)
	}
	gone := i.state == hearthv1.State_STATE_WARM || i.state == hearthv1.State_STATE_SERVING || i.state == hearthv1.State_STATE_FROZEN
	i.mu.Unlock()
	if gone {
		e.log.Warn("instance's process ended", "instance", i.id, "status", status)
		e.end(i, hearthv1.State_STATE_GONE, 0)
	}
}
