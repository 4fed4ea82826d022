package instance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/prefetch"
)

// startInRuntime brings a claimed Instance to where its Function's code is loaded in the Runtime that is booted there, or that is
// booted now: that is the cold path, so that a Function never depends on a pool.
func (e *Engine) startInRuntime(ctx context.Context, i *instance, a *activation) error {
	code, err := e.codes.take(ctx, a.code, a.trace)
	if err != nil {
		return err
	}
	i.mu.Lock()
	i.code = code
	cold := i.booted == nil
	i.mu.Unlock()
	if cold {
		if a.process, err = e.boot(ctx, i, a.runtime, a.trace); err != nil {
			return err
		}
	}
	i.mu.Lock()
	b := i.booted
	i.mu.Unlock()
	layers := layersWith(b, code)
	e.ahead.read(layers)
	done, err := e.starts.turn(ctx, a.trace)
	if err != nil {
		return err
	}
	defer done()
	begin := time.Now()
	if !cold { // what a Runtime says that is booted for this Function is the Function's
		if err := e.logs.keep(runtimeLog(b.name), i.id, e.outputOf(i.id)); err != nil {
			return err
		}
	}
	log, err := e.specialise(ctx, i, b, code, a)
	if err != nil {
		return err
	}
	if err := e.serve(ctx, i, a.revision); err != nil {
		return err
	}
	a.trace.since(phaseMount, begin)
	recorded := e.recordReads(i, layers)
	err = e.load(ctx, i, b, a, log)
	recorded(err)
	return err
}

// layersWith are what a Function's load reads from: its Runtime's, and those of its code above them. They are nil if some are not known.
func layersWith(b *booted, code *codeView) []prefetch.Layer {
	above := code.tree.Layers()
	if b.layers == nil || above == nil {
		return nil
	}
	return append(slices.Clone(b.layers), above...)
}

// specialise gives a booted Instance what is its Function's: first the mark, from which there is no return, then log, limits, code
// and secrets. It returns the log's path.
func (e *Engine) specialise(ctx context.Context, i *instance, b *booted, code *codeView, a *activation) (string, error) {
	if err := e.mark(i.id); err != nil {
		return "", err
	}
	log, err := e.logs.claim(a.revision.Function, i.id, e.outputOf(i.id))
	if err != nil {
		return "", err
	}
	if err := e.limit(i, b.container, a.revision.GetResources()); err != nil {
		return "", err
	}
	tree, err := code.tree.Clone()
	if err != nil {
		return "", fmt.Errorf("code of %s: %w", a.revision.Name, err)
	}
	defer tree.Close()
	return log, e.mount(ctx, b.container, a, attachment{Path: codePath, Tree: tree})
}

// mount attaches trees and the Function's secrets, which are forgotten then.
func (e *Engine) mount(ctx context.Context, container launcher, a *activation, list ...attachment) error {
	if len(a.secrets) > 0 {
		tree, err := secretsTree(a.secrets)
		if err != nil {
			return err
		}
		defer tree.Close()
		list = append(list, attachment{Path: secretsPath, Tree: tree})
		a.secrets = nil
	}
	if len(list) == 0 {
		return nil
	}
	return container.Mount(ctx, list...)
}

// load has the loader load the Function, and returns when it listens.
func (e *Engine) load(ctx context.Context, i *instance, b *booted, a *activation, log string) error {
	conn := b.loader()
	if conn == nil {
		return errLoaderGone
	}
	i.mu.Lock()
	netns, endpoint := i.sandbox.Netns, i.endpoint()
	i.mu.Unlock()
	told, cancel := e.expect(netns, endpoint.Port()) // before anything can listen
	defer cancel()
	begin := time.Now()
	phases, executing, err := conn.load(ctx, question(a.revision), func(list imports, took time.Duration) {
		e.imports.add(b, a.revision.Function, list, took)
	})
	e.metrics.loaded(b.name, time.Since(begin), executing, err)
	if err != nil {
		return e.loadFailed(ctx, i, a, log, err)
	}
	a.trace.since(phaseLoad, begin)
	at, end := begin, time.Now()
	for _, p := range phases {
		took := min(p.Duration, end.Sub(at))
		a.trace.add(phaseLoad+"_"+p.Name, at, took, 0)
		at = at.Add(took)
	}
	if !executing {
		return nil
	}
	b.left()
	begin = time.Now()
	if err := e.awaitListening(ctx, i, told, endpoint); err != nil {
		return e.withOutput(ctx, err, log)
	}
	a.trace.since(phaseProcess, begin)
	return nil
}

// question is what the loader is told of a Revision.
func question(r *hearthv1.Revision) loadQuestion {
	q := loadQuestion{
		Code: codePath, Handler: r.GetCode().GetHandler(), Signature: "http",
		Address: "0.0.0.0:" + strconv.Itoa(int(r.Port)), Env: maps.Clone(r.Env),
	}
	if q.Env == nil {
		q.Env = map[string]string{}
	}
	q.Env["PORT"] = strconv.Itoa(int(r.Port))
	if r.GetCode().GetSignature() == hearthv1.Signature_SIGNATURE_CLOUDEVENT {
		q.Signature = "cloudevent"
	}
	return q
}

// loadFailed makes of a load's error what its caller can act upon. What the loader itself says of the Function is all there is to
// say; otherwise its last output may tell.
func (e *Engine) loadFailed(ctx context.Context, i *instance, a *activation, log string, err error) error {
	if own := (*loadError)(nil); errors.As(err, &own) {
		return fmt.Errorf("the function did not load: %w", err)
	}
	if ctx.Err() == nil {
		err = e.withStatus(ctx, i, err)
	}
	return e.withOutput(ctx, fmt.Errorf("load handler %q: %w", a.revision.GetCode().GetHandler(), err), log)
}

// secretsOf takes the secrets out of a request, so that they are held by nothing that lives as long as an Instance.
func secretsOf(r *hearthv1.Revision) map[string][]byte {
	secrets := r.GetSecrets()
	if r != nil {
		r.Secrets = nil
	}
	return secrets
}
