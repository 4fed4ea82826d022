// Command stargz-snapshotter serves the stargz snapshotter to a containerd. The project's own command is in no Go module that
// could be required, so this is the least that puts its service package behind containerd's gRPC, as that command does. It is a
// peer that Hearth is measured beside, and no part of Hearth.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
)

func main() {
	address := flag.String("address", "", "Unix socket to serve on")
	root := flag.String("root", "", "folder of layers and snapshots")
	config := flag.String("config", "", "TOML file, in the stargz snapshotter's own terms")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, *address, *root, *config); err != nil {
		fmt.Fprintln(os.Stderr, "stargz-snapshotter:", err)
		os.Exit(1)
	}
}

// serve until ctx is done.
func serve(ctx context.Context, address, root, configFile string) (err error) {
	var config service.Config
	if configFile != "" {
		text, err := os.ReadFile(configFile)
		if err != nil {
			return fmt.Errorf("read configuration: %w", err)
		}
		if err := toml.Unmarshal(text, &config); err != nil {
			return fmt.Errorf("parse %s: %w", configFile, err)
		}
	}
	snapshots, err := service.NewStargzSnapshotterService(ctx, root, &config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, snapshots.Close()) }()
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshots))
	defer context.AfterFunc(ctx, server.GracefulStop)()
	return server.Serve(listener)
}
