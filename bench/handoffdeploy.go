package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/bench/images"
)

// preloads are the libraries that a Runtime is to have loaded when it waits, as its users would say.
func preloads() map[string]string {
	return map[string]string{"python": "numpy,pandas,flask,requests"}
}

// deploy makes the case's Functions, all alike, and returns their names, also of those that it did not get to. What has no Runtime is an image; the rest is deployed as a
// user does, by `hearth`, and then copied.
func (h *handoff) deploy(ctx context.Context, c handoffCase) (functions []string, err error) {
	for i := range c.functions() {
		functions = append(functions, fmt.Sprintf("%s-%s-%d", c.runtime, c.degree, i))
	}
	spec := &hearthv1.FunctionSpec{}
	if c.runtime == ofImage {
		spec.Image, err = h.o.push(ctx, h.stack.status.Registry, h.o.image())
	} else {
		spec, err = h.deployCode(ctx, c, functions[0])
	}
	if err != nil {
		return functions, err
	}
	spec.Scaling = &hearthv1.Scaling{Max: 1}
	if c.degree == fromRevision { // it is frozen as soon as it is idle
		spec.Scaling.Window, spec.Scaling.Grace = durationpb.New(time.Second), durationpb.New(0)
	}
	h.o.say("%s: deploying %d functions", c, len(functions))
	for _, f := range functions {
		spec := proto.CloneOf(spec)
		_, err := h.stack.functions.Apply(ctx, connect.NewRequest(&hearthv1.ApplyRequest{Function: &hearthv1.Function{Name: f, Spec: spec}, Prepare: true}))
		if err != nil {
			return functions, fmt.Errorf("deploy %s: %w", f, err)
		}
	}
	return functions, nil
}

// deployCode applies the Runtime with as many warm Instances as the case starts at once, and deploys the sample handler.
func (h *handoff) deployCode(ctx context.Context, c handoffCase, function string) (*hearthv1.FunctionSpec, error) {
	name := "runtime-" + c.runtime
	if !slices.Contains(images.Names(), name) {
		return nil, fmt.Errorf("%w: there is no sample image %s, with a loader of %s", errMissing, name, c.runtime)
	}
	dir, handler, err := images.Handler(ctx, h.o.images(), c.runtime)
	if err != nil {
		return nil, err
	}
	ref, err := h.o.push(ctx, h.stack.status.Registry, name)
	if err != nil {
		return nil, err
	}
	warm := 0
	if c.degree == fromRuntime {
		warm = c.n
	}
	apply := []string{"runtime", "apply", c.runtime, "--image", ref, "--warm", strconv.Itoa(warm)}
	if libraries := preloads()[c.runtime]; libraries != "" {
		apply = append(apply, "--preload", libraries)
	}
	if err := h.hearthCommand(ctx, apply...); err != nil {
		return nil, err
	}
	if err := h.hearthCommand(ctx, "deploy", function, "--runtime", c.runtime, "--handler", handler, dir); err != nil {
		return nil, err
	}
	got, err := h.stack.functions.Get(ctx, connect.NewRequest(&hearthv1.GetRequest{Name: function}))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", function, err)
	}
	return got.Msg.GetFunction().GetSpec(), nil
}

// exitUsage is hearth's exit code when it does not know the words of a command.
const exitUsage = 2

// hearthCommand is what a user types.
func (h *handoff) hearthCommand(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(h.o.Bin, "hearth"), append(args, "--run", h.stack.status.Run)...)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == exitUsage {
		err = errors.Join(errMissing, err)
	}
	return fmt.Errorf("hearth %s: %w: %s", strings.Join(args[:2], " "), err, strings.TrimSpace(string(out)))
}

// retire deletes the case's Functions and its Runtime, and waits until nothing of them is left.
func (h *handoff) retire(ctx context.Context, c handoffCase, functions []string) error {
	var errs []error
	for _, f := range functions {
		_, err := h.stack.functions.Delete(ctx, connect.NewRequest(&hearthv1.DeleteRequest{Name: f}))
		if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
			errs = append(errs, fmt.Errorf("delete %s: %w", f, err))
		}
	}
	if c.runtime != ofImage {
		_, err := h.stack.runtimes.DeleteRuntime(ctx, connect.NewRequest(&hearthv1.DeleteRuntimeRequest{Name: c.runtime}))
		// Without the service there is no Runtime either, and that has been said when it was to be applied.
		if code := connect.CodeOf(err); err != nil && code != connect.CodeNotFound && code != connect.CodeUnimplemented {
			errs = append(errs, fmt.Errorf("delete runtime %s: %w", c.runtime, err))
		}
	}
	err := h.await(ctx, c.patience(), func(all []*hearthv1.Instance) (bool, error) {
		return !slices.ContainsFunc(all, func(i *hearthv1.Instance) bool {
			return i.GetState() != hearthv1.State_STATE_WARM || i.GetRuntime() != ""
		}), nil
	})
	if err != nil {
		errs = append(errs, fmt.Errorf("await the end of %s: %w", c, err))
	}
	return errors.Join(errs...)
}

// plainImage has an image on the pods' node.
func (h *handoff) plainImage(ctx context.Context, name string) (string, error) {
	if ref := h.plain[name]; ref != "" {
		return ref, nil
	}
	ref, err := h.o.push(ctx, h.stack.status.Registry, name)
	if err != nil {
		return "", err
	}
	if _, err := h.pods.pull(ctx, ref); err != nil {
		return "", err
	}
	h.plain[name] = ref
	return ref, nil
}
