package register

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	content "github.com/containerd/containerd/api/services/content/v1"
	leases "github.com/containerd/containerd/api/services/leases/v1"
	namespaces "github.com/containerd/containerd/api/services/namespaces/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// forgetTimeout bounds how long containerd may take to forget.
const forgetTimeout = 2 * time.Minute

// forget has containerd forget its snapshots of the snapshotter, whose folder goes: it would take them for there, and refuse to make
// them again when an image is pulled once more. What holds them is taken away, leases and the marks of images; then containerd collects
// its garbage. Those of containers that are still there stay. The snapshotter itself need not answer.
func forget(ctx context.Context, socket, snapshotter string) error {
	ctx, cancel := context.WithTimeout(ctx, forgetTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	all, err := namespaces.NewNamespacesClient(conn).List(ctx, &namespaces.ListNamespacesRequest{})
	if err != nil {
		return fmt.Errorf("list containerd's namespaces: %w", err)
	}
	for _, n := range all.GetNamespaces() {
		ctx := metadata.AppendToOutgoingContext(ctx, "containerd-namespace", n.GetName())
		err := errors.Join(
			unlease(ctx, leases.NewLeasesClient(conn), "snapshots/"+snapshotter),
			unmark(ctx, content.NewContentClient(conn), "containerd.io/gc.ref.snapshot."+snapshotter),
			collect(ctx, leases.NewLeasesClient(conn)),
		)
		if err != nil {
			return fmt.Errorf("have containerd forget snapshots of %s in %s: %w", snapshotter, n.GetName(), err)
		}
	}
	return nil
}

// unlease takes what is of a type out of all leases.
func unlease(ctx context.Context, client leases.LeasesClient, kind string) error {
	all, err := client.List(ctx, &leases.ListRequest{})
	if err != nil {
		return err
	}
	for _, lease := range all.GetLeases() {
		held, err := client.ListResources(ctx, &leases.ListResourcesRequest{ID: lease.GetID()})
		if status.Code(err) == codes.NotFound {
			continue
		}
		if err != nil {
			return err
		}
		for _, r := range held.GetResources() {
			if r.GetType() != kind {
				continue
			}
			_, err := client.DeleteResource(ctx, &leases.DeleteResourceRequest{ID: lease.GetID(), Resource: r})
			if err != nil && status.Code(err) != codes.NotFound {
				return err
			}
		}
	}
	return nil
}

// unmark takes a label from all content.
func unmark(ctx context.Context, client content.ContentClient, label string) error {
	stream, err := client.List(ctx, &content.ListContentRequest{Filters: []string{fmt.Sprintf("labels.%q", label)}})
	if err != nil {
		return err
	}
	var marked []string
	for {
		some, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		for _, info := range some.GetInfo() {
			marked = append(marked, info.GetDigest())
		}
	}
	for _, digest := range marked {
		_, err := client.Update(ctx, &content.UpdateRequest{
			Info:       &content.Info{Digest: digest, Labels: map[string]string{label: ""}},
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels." + label}},
		})
		if err != nil && status.Code(err) != codes.NotFound {
			return err
		}
	}
	return nil
}

// collect returns when containerd has collected its garbage.
func collect(ctx context.Context, client leases.LeasesClient) error {
	lease, err := client.Create(ctx, &leases.CreateRequest{ID: fmt.Sprintf("hearth-unregister-%d", time.Now().UnixNano())})
	if err != nil {
		return err
	}
	_, err = client.Delete(ctx, &leases.DeleteRequest{ID: lease.GetLease().GetID(), Sync: true})
	return err
}
