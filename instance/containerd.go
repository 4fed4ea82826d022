package instance

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// node is the backend over a real containerd: one connection, used for containerd's own API and for the CRI. The connection
// comes back by itself after containerd was away; calls fail at once while it is.
type node struct {
	conn        *grpc.ClientConn
	client      *containerd.Client
	runtime     cri.RuntimeServiceClient
	image       cri.ImageServiceClient
	name        string
	namespace   string
	snapshotter string
	cgroups     cgroups
	scratch     string // an empty directory
	credentials func(ctx context.Context, ref string) (user, secret string, err error)
	fetch       func(ctx context.Context, ref string) error

	mu    sync.Mutex // guards users
	users map[userKey]specs.User
}

// userKey names a user of an image.
type userKey struct{ chainID, user string }

// reconnectDelay is the longest that the connection waits before it tries again.
const reconnectDelay = time.Second

func connectNode(cfg Config) (*node, error) {
	conn, err := grpc.NewClient("unix://"+cfg.Address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectDelay},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", cfg.Address, err)
	}
	client, err := containerd.NewWithConn(conn)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to containerd at %s: %w", cfg.Address, err), conn.Close())
	}
	var learnt *podGroups
	if cfg.Kubelet != "" {
		learnt = &podGroups{paths: map[string]string{}}
	}
	return &node{
		conn: conn, client: client,
		runtime: cri.NewRuntimeServiceClient(conn), image: cri.NewImageServiceClient(conn),
		name: cfg.Node, namespace: cfg.Namespace, snapshotter: cfg.Snapshotter,
		cgroups:     cgroups{root: cgroupRoot, parent: cfg.CgroupParent, learnt: learnt},
		scratch:     filepath.Join(cfg.Root, scratchDir),
		credentials: cfg.Credentials,
		fetch:       cfg.Fetch,
		users:       map[userKey]specs.User{},
	}, nil
}

// Close ends the connection.
func (n *node) Close() error { return n.client.Close() }

// in puts ctx into the namespace that the CRI works in.
func (n *node) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, n.namespace)
}

// leased is in, for calls that make or remove snapshots which the engine's lease protects.
func (n *node) leased(ctx context.Context) context.Context {
	return leases.WithLease(n.in(ctx), n.lease())
}

func (n *node) lease() string { return "hearth-prepared-" + n.name }

func leaseOf(id string) leases.Lease { return leases.Lease{ID: id} }

// Ready also makes sure that the lease is there, because nothing can be prepared without it.
func (n *node) Ready(ctx context.Context) error {
	status, err := n.runtime.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	for _, c := range status.GetStatus().GetConditions() {
		if (c.Type == cri.RuntimeReady || c.Type == cri.NetworkReady) && !c.Status {
			return fmt.Errorf("containerd is not ready: %s: %s: %w", c.Reason, c.Message, errdefs.ErrUnavailable)
		}
	}
	_, err = n.client.LeasesService().Create(n.in(ctx), leases.WithID(n.lease()))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("create lease %s: %w", n.lease(), err)
	}
	return nil
}

// absent turns NotFound into success, for removals.
func absent(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
