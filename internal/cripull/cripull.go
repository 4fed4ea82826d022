// Package cripull is how Hearth itself has containerd pull an image: by the CRI, as the kubelet does, with what the image's registry
// wants to know, and with the layers fetched before containerd takes its locks.
package cripull

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs/pkg/errgrpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Handler is the runtime handler for which Hearth pulls, so that containerd unpacks with Hearth's snapshotter where the CRI's own is
// another one (internal/register). A containerd that has none of that name takes its own.
const Handler = "hearth"

// handlerAnnotation is how containerd before 2.1 is told of a runtime handler.
const handlerAnnotation = "io.containerd.cri.runtime-handler"

// Puller pulls images. It is a value: whoever has its parts makes one. Images is required.
type Puller struct {
	// Images is containerd's.
	Images cri.ImageServiceClient
	// Credentials are what an image's registry wants to know: an identity token has no user. Nil, or both empty: nothing is told.
	Credentials func(ctx context.Context, ref string) (user, secret string, err error)
	// Fetch brings an image's layers before containerd is asked for it; nil: nobody does. What goes wrong comes up in the pull.
	Fetch func(ctx context.Context, ref string) error
}

// Pull returns when the image is there, with its id. The error is one of containerd's errdefs if it is containerd's.
func (p Puller) Pull(ctx context.Context, ref string) (id string, err error) {
	request := &cri.PullImageRequest{
		Image:         &cri.ImageSpec{Image: ref, RuntimeHandler: Handler},
		SandboxConfig: &cri.PodSandboxConfig{Annotations: map[string]string{handlerAnnotation: Handler}}, // without one containerd does not look at the handler
	}
	if p.Credentials != nil {
		user, secret, err := p.Credentials(ctx, ref)
		if err != nil {
			return "", fmt.Errorf("credentials for image %s: %w", ref, err)
		}
		switch {
		case user != "":
			request.Auth = &cri.AuthConfig{Username: user, Password: secret}
		case secret != "":
			request.Auth = &cri.AuthConfig{IdentityToken: secret}
		}
	}
	if p.Fetch != nil {
		_ = p.Fetch(ctx, ref) // the pull says what is wrong
	}
	resp, err := p.Images.PullImage(ctx, request)
	if err != nil {
		return "", fmt.Errorf("pull image %s: %w", ref, errgrpc.ToNative(err))
	}
	return resp.GetImageRef(), nil
}
