package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// machineStack is the whole of Hearth on this machine, brought up for a suite and taken down without a trace.
type machineStack struct {
	status     *stack.Status
	functions  hearthv1connect.FunctionServiceClient
	allocation hearthv1connect.AllocationServiceClient
	runtimes   hearthv1connect.RuntimeServiceClient
	pool       int
	cancel     context.CancelFunc
	ended      chan error
}

// stackOptions of a machineStack: with a registry or without, how many sandboxes are kept warm, -1 for none, and flags
// of nodeagent.
type stackOptions struct {
	registry bool
	pool     int
	node     []string
}

// startStack brings Hearth up with its data in dir. Sockets go to a short path, as their names must be.
func startStack(ctx context.Context, o *Options, dir string, options stackOptions) (*machineStack, error) {
	run, err := os.MkdirTemp("", "hearth-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for sockets: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &machineStack{pool: options.pool, cancel: cancel, ended: make(chan error, 1)}
	up := make(chan *stack.Status, 1)
	config := stack.Config{
		Name: filepath.Base(run), Root: filepath.Join(dir, "hearth"), Run: run, Tools: o.Tools, Bin: o.Bin,
		GatewayAddress: "127.0.0.1:0", Registry: options.registry, RegistryAddress: "127.0.0.1:0", PoolSize: options.pool, NodeFlags: options.node,
	}
	if options.pool > 0 { // a suite that starts functions has time for the story
		config.Progress = func(line string) { o.say("%s", line) }
	}
	go func() { s.ended <- stack.Run(ctx, config, func(st *stack.Status) { up <- st }) }()
	select {
	case s.status = <-up:
	case err := <-s.ended:
		cancel()
		return nil, errors.Join(errors.New("bring Hearth up"), err)
	}
	client := daemon.UnixClient(filepath.Join(run, stack.PoolSocket))
	s.functions = hearthv1connect.NewFunctionServiceClient(client, "http://hearth")
	s.allocation = hearthv1connect.NewAllocationServiceClient(client, "http://hearth")
	s.runtimes = hearthv1connect.NewRuntimeServiceClient(client, "http://hearth")
	return s, nil
}

// stop takes everything down.
func (s *machineStack) stop() error {
	s.cancel()
	return <-s.ended
}

func (s *machineStack) containerdSocket() string {
	return filepath.Join(s.status.Run, stack.ContainerdSocket)
}

// url of a Function at the gateway.
func (s *machineStack) url(function string) string { return s.status.Gateway + "/fn/" + function + "/" }

// pid of a daemon as it runs now.
func (s *machineStack) pid(name string) (int, error) {
	d, err := s.daemon(name)
	return d.PID, err
}

// admin is the socket of a daemon's metrics.
func (s *machineStack) admin(name string) (string, error) {
	d, err := s.daemon(name)
	return d.Admin, err
}

func (s *machineStack) daemon(name string) (stack.Daemon, error) {
	st, err := stack.ReadStatus(s.status.Run)
	if err != nil {
		return stack.Daemon{}, err
	}
	for _, d := range st.Daemons {
		if d.Name == name {
			return d, nil
		}
	}
	return stack.Daemon{}, fmt.Errorf("no daemon %s is running", name)
}

// deploy pushes a sample image and deploys it as a Function of the same name.
func (s *machineStack) deploy(ctx context.Context, o *Options, name string) error {
	o.say("pushing the image %s to %s", name, s.status.Registry)
	ref, err := o.push(ctx, s.status.Registry, name)
	if err != nil {
		return err
	}
	return s.deployImage(ctx, o, name, ref)
}

// deployImage deploys an image of a registry.
func (s *machineStack) deployImage(ctx context.Context, o *Options, name, ref string) error {
	o.say("deploying %s", name)
	_, err := s.functions.Apply(ctx, connect.NewRequest(&hearthv1.ApplyRequest{
		Function: &hearthv1.Function{Name: name, Spec: &hearthv1.FunctionSpec{Image: ref}},
		Prepare:  true,
	}))
	if err != nil {
		return fmt.Errorf("deploy %s: %w", name, err)
	}
	return nil
}

// reset takes a Function back to no Instance, with its image absent if forget is set and otherwise prepared, and waits until
// the pool is full.
func (s *machineStack) reset(ctx context.Context, function string, forget bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	_, err := s.allocation.Release(ctx, connect.NewRequest(&hearthv1.ReleaseRequest{Function: function, Wait: true, ForgetImage: forget}))
	if err != nil {
		return fmt.Errorf("release %s: %w", function, err)
	}
	if !forget {
		if err := s.prepare(ctx, function); err != nil {
			return err
		}
	}
	for {
		instances, err := s.instances(ctx, "")
		if err != nil {
			return err
		}
		warm := 0
		for _, i := range instances {
			if i.GetState() == hearthv1.State_STATE_WARM {
				warm++
			}
		}
		if warm >= s.pool && warm == len(instances) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("await a full pool: %w: %v", ctx.Err(), instances)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// prepare has the image on the node again, as a deploy does.
func (s *machineStack) prepare(ctx context.Context, function string) error {
	got, err := s.functions.Get(ctx, connect.NewRequest(&hearthv1.GetRequest{Name: function}))
	if err != nil {
		return fmt.Errorf("read %s: %w", function, err)
	}
	_, err = s.functions.Apply(ctx, connect.NewRequest(&hearthv1.ApplyRequest{
		Function: &hearthv1.Function{Name: function, Spec: got.Msg.GetFunction().GetSpec()}, Prepare: true,
	}))
	if err != nil {
		return fmt.Errorf("prepare %s: %w", function, err)
	}
	return nil
}

func (s *machineStack) instances(ctx context.Context, function string) ([]*hearthv1.Instance, error) {
	list, err := s.functions.ListInstances(ctx, connect.NewRequest(&hearthv1.ListInstancesRequest{Function: function}))
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	return list.Msg.GetInstances(), nil
}

// address of an Instance that serves a Function, made to by a request if there is none.
func (s *machineStack) address(ctx context.Context, function string) (string, error) {
	client := newClient()
	defer client.CloseIdleConnections()
	if _, _, err := firstByte(ctx, client, s.url(function), nil); err != nil {
		return "", err
	}
	instances, err := s.instances(ctx, function)
	if err != nil {
		return "", err
	}
	for _, i := range instances {
		if i.GetState() == hearthv1.State_STATE_SERVING {
			return i.GetAddress(), nil
		}
	}
	return "", fmt.Errorf("no instance of %s serves: %v", function, instances)
}
