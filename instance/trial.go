package instance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// trialName begins the ids of trials' Instances, and is the Function under which their logs are kept.
	trialName = "hearth-trial"
	// trialTime bounds a trial, the pull not counted.
	trialTime = 5 * time.Minute
)

// Try starts an image in an Instance of its own, of which no poolmanager hears, and ends it when served has returned; that is called
// with the address when the image listens. What is tried is given as a Revision, whose names do not matter. It returns how long the
// image took from the claim until it listened. The errors are errdefs': ErrFailedPrecondition where the kubelet makes sandboxes.
func (e *Engine) Try(ctx context.Context, what *hearthv1.Revision, served func(ctx context.Context, address string) error) (ready time.Duration, err error) {
	id := trialName + "-" + strings.ToLower(rand.Text()[:12])
	what.Function, what.Name = trialName, trialName+"-00001"
	ref, code, err := checkRevision(what)
	switch {
	case err != nil:
		return 0, err
	case code != "":
		return 0, invalid("revision has a runtime: images are tried, not code")
	case e.cfg.Kubelet != "":
		return 0, fmt.Errorf("the kubelet makes the sandboxes of this node, none can be made for a trial: %w", errdefs.ErrFailedPrecondition)
	}
	if err := e.open(); err != nil {
		return 0, err
	}
	if _, err := e.library.ensure(ctx, ref, newTrace(time.Now())); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, trialTime)
	defer cancel()
	i, _, err := e.enter(id, "", owner{})
	if err != nil {
		return 0, err
	}
	i.mu.Lock()
	i.trial = true
	i.mu.Unlock()
	e.beginCreation(i, nil)
	defer func() {
		err = errors.Join(err, e.discard(context.WithoutCancel(ctx), &hearthv1.DiscardRequest{InstanceId: id}))
	}()
	if _, err := e.awaitWarm(ctx, i); err != nil {
		return 0, err
	}
	begin := time.Now()
	serving, err := e.activate(ctx, &hearthv1.ActivateRequest{
		InstanceId: id, Revision: what, Claim: &hearthv1.Claim{Id: id, Deadline: timestamppb.New(begin.Add(trialTime))},
	})
	if err != nil {
		return 0, err
	}
	ready = time.Since(begin)
	return ready, served(ctx, serving.GetInstance().GetAddress())
}

// Named finds a reference of an image by its layers, and the digest of the manifest or index that it stood for when it was pulled.
func (e *Engine) Named(chainID digest.Digest) (ref string, dgst digest.Digest, ok bool) {
	return e.library.named(chainID.String())
}

// Pull has an image on the node and returns the chain ID of its layers; Lookup does so if it is there already. The errors are errdefs'.
func (e *Engine) Pull(ctx context.Context, ref string) (chainID digest.Digest, err error) {
	return e.chainOf(ref, func(named string) (*image, error) { return e.library.ensure(ctx, named, newTrace(time.Now())) })
}

// Lookup is Pull, but that it answers ErrNotFound for what is not on the node.
func (e *Engine) Lookup(ctx context.Context, ref string) (chainID digest.Digest, err error) {
	return e.chainOf(ref, func(named string) (*image, error) { return e.library.look(ctx, named) })
}

func (e *Engine) chainOf(ref string, find func(named string) (*image, error)) (digest.Digest, error) {
	named, err := normalize(ref)
	if err != nil {
		return "", invalid("%s", err)
	}
	if err := e.open(); err != nil {
		return "", err
	}
	img, err := find(named.String())
	if err != nil {
		return "", err
	}
	return digest.Digest(img.ChainID), nil
}
