package instance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/prefetch"
)

// greetTime bounds the wait for a word of a loader that has been ready before, and has nothing to do but to say it.
const greetTime = 5 * time.Second

// loaderGone is what labelLoader says of an Instance whose loader became the Function's own process.
const loaderGone = "gone"

// booted is the Runtime in an Instance. What does not change is set before anyone else sees it.
type booted struct {
	name       string
	generation int64
	container  launcher
	exited     <-chan struct{}
	layers     []prefetch.Layer // of its image; nil if that is not known, as after a restart

	mu   sync.Mutex // guards what follows
	conn *loader    // nil after a restart, until it is needed
	gone bool       // the Function's process has taken the loader's place
	said string     // what the loader says that it is, once it has greeted: its language with the version
}

// thawed tells the loader, if there is one, that it was frozen for a while; best before it is thawed. What it returns waits for the
// answer. If it fails, the Instance must not serve any more; a prompt loader's connection ends with that, and then the Instance does, so
// that nobody has to wait.
func (b *booted) thawed(ctx context.Context, frozenFor time.Duration) (answered func() error, prompt bool, err error) {
	b.mu.Lock()
	conn, gone := b.conn, b.gone
	b.mu.Unlock()
	if gone {
		return func() error { return nil }, true, nil
	}
	bounded, cancel := context.WithTimeout(ctx, greetTime)
	resumed := func() error { return b.resumeAnew(bounded, frozenFor) } // after a restart of ours: only when it is thawed can it answer
	if conn != nil {
		prompt = conn.isPrompt()
		if prompt { // its answer is waited for after the claim
			cancel()
			bounded, cancel = context.WithTimeout(context.WithoutCancel(ctx), greetTime)
		}
		if resumed, err = conn.thawed(bounded, frozenFor); err != nil {
			cancel()
			return nil, false, fmt.Errorf("thaw runtime %s: %w", b.name, err)
		}
	}
	return func() error {
		defer cancel()
		if err := resumed(); err != nil {
			return fmt.Errorf("thaw runtime %s: %w", b.name, err)
		}
		return nil
	}, prompt, nil
}

// resumeAnew tells a loader of a thaw that it has to be connected to first, and waits for its answer.
func (b *booted) resumeAnew(ctx context.Context, frozenFor time.Duration) error {
	conn, g, err := b.connect(ctx)
	if err != nil {
		return err
	}
	if !g.Loaded {
		return errors.New("its loader says that nothing is loaded")
	}
	resumed, err := conn.thawed(ctx, frozenFor)
	if err != nil {
		return err
	}
	return resumed()
}

// connect connects to the loader and waits for its greeting. The connection is b's.
func (b *booted) connect(ctx context.Context) (*loader, *greeting, error) {
	raw, err := b.container.Dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	conn := b.hold(raw)
	g, err := conn.greet(ctx)
	if err == nil {
		b.mu.Lock()
		b.said = g.Runtime
		b.mu.Unlock()
	}
	return conn, g, err
}

// language is what the loader says that it is; empty while it has not greeted.
func (b *booted) language() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.said
}

// hold makes a connection b's one.
func (b *booted) hold(raw net.Conn) *loader {
	conn := newLoader(raw, b.exited)
	b.mu.Lock()
	former := b.conn
	b.conn = conn
	b.mu.Unlock()
	if former != nil {
		former.close()
	}
	return conn
}

// left says that the Function's process has taken the loader's place.
func (b *booted) left() {
	b.mu.Lock()
	b.gone = true
	b.mu.Unlock()
	b.close()
}

// close lets go of the loader, which goes on.
func (b *booted) close() {
	b.mu.Lock()
	conn := b.conn
	b.conn = nil
	b.mu.Unlock()
	if conn != nil {
		conn.close()
	}
}

// loader is the connection there is, or nil.
func (b *booted) loader() *loader {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.conn
}

// labels remember b over a restart.
func (b *booted) labels(to map[string]string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	to[labelRuntime], to[labelGeneration] = b.name, strconv.FormatInt(b.generation, 10)
	if b.gone {
		to[labelLoader] = loaderGone
	}
}

// bootedBefore is what the labels of a former engine say of the Runtime in an Instance; nil if there is none.
func bootedBefore(i *instance, labels map[string]string) *booted {
	if labels[labelRuntime] == "" {
		return nil
	}
	generation, _ := strconv.ParseInt(labels[labelGeneration], 10, 64) // 0 when malformed: nobody asks for that
	return &booted{name: labels[labelRuntime], generation: generation, exited: i.exited, gone: labels[labelLoader] == loaderGone}
}

// fits says whether an Instance may become a Revision; mu must be held. A sandbox may become anything.
func (i *instance) fits(r *hearthv1.Revision) error {
	b, want := i.booted, r.GetRuntime()
	switch {
	case b == nil:
		return nil
	case want == nil:
		return fmt.Errorf("instance %s has booted runtime %s, and %s is an image: %w", i.id, b.name, r.GetName(), errdefs.ErrFailedPrecondition)
	case b.name != want.Name || b.generation != want.Generation:
		return fmt.Errorf("instance %s has booted runtime %s of generation %d, and %s wants %s of generation %d: %w",
			i.id, b.name, b.generation, r.GetName(), want.Name, want.Generation, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// bootWarm boots a Runtime in an Instance that is being created, and has containerd know: the next engine has to find it.
func (e *Engine) bootWarm(ctx context.Context, i *instance, rt *hearthv1.Runtime) error {
	p, err := e.boot(ctx, i, rt, newTrace(time.Now()))
	if keepErr := e.logs.keep(runtimeLog(rt.Name), i.id, e.outputOf(i.id)); keepErr != nil {
		e.log.Warn("output of a runtime not kept", "instance", i.id, "error", keepErr)
	}
	if err != nil {
		return err
	}
	i.mu.Lock()
	box, r := i.sandbox, record{ID: containerID(i.id), Image: i.image, Snapshot: i.snapshot, Labels: e.labels(i)}
	i.mu.Unlock()
	if r.Spec, err = e.spec(ctx, i, box); err != nil {
		return err
	}
	become(r.Spec.Process, p)
	return e.backend.Record(ctx, r)
}

// boot has the launcher of an Instance become a Runtime's loader, and waits until that is ready.
func (e *Engine) boot(ctx context.Context, i *instance, rt *hearthv1.Runtime, t *trace) (*specs.Process, error) {
	img, root, err := e.takeRootfs(ctx, rt.Image, t)
	defer root.close()
	i.mu.Lock()
	i.snapshot, i.image = root.Key, rt.Image
	if img != nil {
		i.chainID = img.ChainID
	}
	b := &booted{name: rt.Name, generation: rt.Generation, container: i.launcher, exited: i.exited, layers: root.Layers}
	i.mu.Unlock()
	if err != nil {
		return nil, err
	}
	p, err := loaderProcess(i.pod.id, img, root.User, rt)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	recorded := e.recordReads(i, root.Layers)
	g, err := e.bootLoader(ctx, i, b, launch{Root: root, Process: p, Loader: true})
	recorded(err)
	e.metrics.booted(rt.Name, time.Since(begin), err)
	t.since(phaseBoot, begin)
	if err != nil {
		return nil, fmt.Errorf("boot runtime %s: %w", rt.Name, err)
	}
	e.log.Debug("runtime booted", "instance", i.id, "runtime", rt.Name, "language", g.Runtime)
	if len(g.Missing) > 0 {
		e.log.Warn("libraries not preloaded", "instance", i.id, "runtime", rt.Name, "missing", g.missingLibraries())
	}
	return p, nil
}

// bootLoader launches a loader and waits for its greeting. From then on the Instance is b's.
func (e *Engine) bootLoader(ctx context.Context, i *instance, b *booted, l launch) (*greeting, error) {
	bounded, cancel := context.WithTimeout(ctx, e.cfg.RuntimeBootTimeout)
	defer cancel()
	if err := b.container.Launch(bounded, l); err != nil {
		return nil, err
	}
	i.mu.Lock()
	i.booted = b
	i.mu.Unlock()
	_, g, err := b.connect(bounded)
	switch {
	case err == nil && g.Loaded:
		return nil, errors.New("its loader says that something is loaded already")
	case err == nil:
		e.follow(i, b)
		return g, nil
	case bounded.Err() != nil && ctx.Err() == nil:
		err = fmt.Errorf("it is not ready within %s", e.cfg.RuntimeBootTimeout)
	default:
		err = e.withStatus(ctx, i, err)
	}
	return nil, e.withOutput(ctx, err, e.outputOf(i.id))
}

// withStatus adds how a loader's process has ended to an error that came of it, if it has.
func (e *Engine) withStatus(ctx context.Context, i *instance, err error) error {
	timer := time.NewTimer(outputDelay) // containerd tells a little later than the connection
	defer timer.Stop()
	select {
	case <-i.exited:
		i.mu.Lock()
		defer i.mu.Unlock()
		return fmt.Errorf("%w: the process ended with status %d", err, i.status)
	case <-timer.C:
	case <-ctx.Done():
	}
	return err
}

// follow has the end of a loader noticed at once.
func (e *Engine) follow(i *instance, b *booted) {
	conn := b.loader()
	if conn == nil {
		return
	}
	e.spawn(func(ctx context.Context) {
		select {
		case <-conn.done:
			e.loaderEnded(i, conn)
		case <-ctx.Done():
		}
	})
}

// loaderEnded ends an Instance whose loader is no more, unless it is being activated: the activation notices.
func (e *Engine) loaderEnded(i *instance, conn *loader) {
	reason := conn.gone()
	i.mu.Lock()
	idle := i.state == hearthv1.State_STATE_WARM || i.state == hearthv1.State_STATE_SERVING
	i.mu.Unlock()
	if reason != nil && idle {
		e.log.Warn("instance's loader has gone", "instance", i.id, "reason", reason)
		e.end(i, hearthv1.State_STATE_GONE, 0)
	}
}

// checkLoader is loaderEnded for what happened while the Instance was being activated.
func (e *Engine) checkLoader(i *instance) {
	i.mu.Lock()
	b := i.booted
	i.mu.Unlock()
	if b == nil {
		return
	}
	if conn := b.loader(); conn != nil {
		select {
		case <-conn.done:
			e.loaderEnded(i, conn)
		default:
		}
	}
}

// adoptBooted takes over an Instance in which a former engine booted a Runtime for nobody yet. It will be Warm when its loader
// has said so, unless a claim had it already: from the mark on it may have held a Function's code, whatever the loader says.
func (e *Engine) adoptBooted(ctx context.Context, i *instance) error {
	if _, err := os.Stat(e.markOf(i.id)); err == nil || !errors.Is(err, os.ErrNotExist) {
		return errors.Join(errors.New("it was claimed and had not come to be recorded"), err)
	}
	if err := e.findLoader(ctx, i); err != nil {
		return err
	}
	i.state, i.warm = hearthv1.State_STATE_CREATING, make(chan struct{})
	return nil
}

// findLoader finds the container of an adopted Instance with a Runtime.
func (e *Engine) findLoader(ctx context.Context, i *instance) error {
	c := e.container(i.id)
	c.Loader = true
	l, err := e.backend.FindTask(ctx, c)
	i.launcher, i.booted.container = l, l
	return err
}

// greetAdopted makes an adopted Instance Warm when its loader says that nothing is loaded; i.mu must be held.
func (e *Engine) greetAdopted(i *instance) {
	b, box, l := i.booted, i.sandbox, i.launcher
	begun := e.begin(i, time.Now().Add(greetTime), func(ctx context.Context) {
		_, g, err := b.connect(ctx)
		if err == nil && g.Loaded {
			err = errors.New("a Function is loaded in it")
		}
		e.endCreation(i, box, l, err)
		if err == nil {
			e.follow(i, b)
		}
	})
	if !begun {
		i.failure = errStopping
		close(i.warm)
	}
}

// markOf is a file that says that an Instance is claimed. It is made before anything of a Function is in the Instance, and never
// removed before that.
func (e *Engine) markOf(id string) string { return filepath.Join(e.filesOf(id), "claimed") }

// mark makes it. It need not be durable: what it speaks of ends with the machine.
func (e *Engine) mark(id string) error {
	f, err := os.OpenFile(e.markOf(id), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("mark instance %s as claimed: %w", id, err)
	}
	return f.Close()
}
