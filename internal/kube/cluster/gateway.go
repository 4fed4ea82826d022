package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// gatewayName is the Service of the gateways.
const gatewayName = "hearth-gateway"

// Ports of the gateways: what they listen on for callers, and what their Service has instead.
const (
	gatewayPort = 8080
	servicePort = 80
)

// ForwardGateway has a port of this machine lead to a gateway that is ready, until close is called. Errors: Unavailable (none is ready),
// PermissionDenied (the user may not forward ports of pods in the daemons' namespace).
func (c *Client) ForwardGateway(ctx context.Context) (address string, closed func(), err error) {
	pod, err := c.gatewayPod(ctx)
	if err != nil {
		return "", nil, err
	}
	return c.forward(ctx, pod, gatewayPort)
}

// gatewayPod is a gateway that is ready.
func (c *Client) gatewayPod(ctx context.Context) (*corev1.Pod, error) {
	var pods corev1.PodList
	if err := c.api.List(ctx, &pods, client.InNamespace(SystemNamespace), client.MatchingLabels{nameLabel: daemonsName, componentLabel: gateway}); err != nil {
		return nil, c.coded(err)
	}
	if i := slices.IndexFunc(pods.Items, func(p corev1.Pod) bool { return isReady(&p) }); i >= 0 {
		return &pods.Items[i], nil
	}
	return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("no gateway is ready in namespace %s (there are %d)", SystemNamespace, len(pods.Items)))
}

// forward is kubectl port-forward, from a free port of loopback.
func (c *Client) forward(ctx context.Context, pod *corev1.Pod, port int) (string, func(), error) {
	dialer, err := c.portDialer(pod)
	if err != nil {
		return "", nil, c.coded(err)
	}
	// What goes wrong with single connections shows in the requests over them; the library would write it to stderr besides.
	ctx, cancel := context.WithCancel(klog.NewContext(ctx, logr.Discard()))
	ready := make(chan struct{})
	forwarder, err := portforward.NewOnAddressesForStreamingWithContext(ctx, dialer, []string{"127.0.0.1"}, []string{"0:" + strconv.Itoa(port)}, ready, io.Discard, io.Discard)
	if err != nil {
		cancel()
		return "", nil, c.coded(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	stop := func() {
		cancel()
		<-ended
	}
	select {
	case err := <-ended:
		cancel()
		return "", nil, c.coded(fmt.Errorf("forward a port of pod %s: %w", pod.Name, errors.Join(err, ctx.Err())))
	case <-ready:
	}
	ports, err := forwarder.GetPorts()
	if err != nil || len(ports) == 0 {
		stop()
		return "", nil, c.coded(fmt.Errorf("forward a port of pod %s: %w", pod.Name, err))
	}
	return "127.0.0.1:" + strconv.Itoa(int(ports[0].Local)), stop, nil
}

// portDialer connects to a pod's ports by WebSocket, or by SPDY where the API server or a proxy before it wants that, as kubectl does.
func (c *Client) portDialer(pod *corev1.Pod) (httpstream.Dialer, error) {
	base, _, err := rest.DefaultServerUrlFor(c.config)
	if err != nil {
		return nil, err
	}
	target := base.JoinPath("api/v1/namespaces", pod.Namespace, "pods", pod.Name, "portforward")
	transport, upgrader, err := spdy.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	old := spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, target)
	tunnel, err := portforward.NewSPDYOverWebsocketDialerForStreaming(target, c.config)
	if err != nil {
		return nil, err
	}
	return portforward.NewFallbackDialerForStreaming(tunnel, old, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	}), nil
}

// GatewayURL is where callers find the gateways: the address that the Service has been given outside, or its name inside of the cluster.
func (c *Client) GatewayURL(ctx context.Context) (string, error) {
	var service corev1.Service
	if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: gatewayName}, &service); err != nil {
		return "", c.coded(err)
	}
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		if host := cmp.Or(ingress.Hostname, ingress.IP); host != "" {
			return (&url.URL{Scheme: "http", Host: strings.TrimSuffix(net.JoinHostPort(host, strconv.Itoa(servicePort)), ":80")}).String(), nil
		}
	}
	return "http://" + gatewayName + "." + SystemNamespace + ".svc", nil
}
