package cli

import (
	"context"
	"path/filepath"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// baseURL is what requests over Unix sockets name; the host means nothing.
const baseURL = "http://hearth"

func (a *app) functions() hearthv1connect.FunctionServiceClient {
	return hearthv1connect.NewFunctionServiceClient(daemon.UnixClient(filepath.Join(a.run, stack.PoolSocket)), baseURL)
}

func (a *app) allocation() hearthv1connect.AllocationServiceClient {
	return hearthv1connect.NewAllocationServiceClient(daemon.UnixClient(filepath.Join(a.run, stack.PoolSocket)), baseURL)
}

func (a *app) node() hearthv1connect.NodeServiceClient {
	return hearthv1connect.NewNodeServiceClient(daemon.UnixClient(filepath.Join(a.run, stack.NodeSocket)), baseURL)
}

// completeFunction offers the names of Functions.
func (a *app) completeFunction(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	list, err := a.functionList(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, f := range list {
		names = append(names, f.GetName())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) functionList(ctx context.Context) ([]*hearthv1.Function, error) {
	resp, err := a.functions().List(ctx, connect.NewRequest(&hearthv1.ListRequest{}))
	if err != nil {
		return nil, explain(err, "list functions", a.run)
	}
	return resp.Msg.GetFunctions(), nil
}

func (a *app) instanceList(ctx context.Context, function string) ([]*hearthv1.Instance, error) {
	resp, err := a.functions().ListInstances(ctx, connect.NewRequest(&hearthv1.ListInstancesRequest{Function: function}))
	if err != nil {
		return nil, explain(err, "list instances", a.run)
	}
	return resp.Msg.GetInstances(), nil
}
